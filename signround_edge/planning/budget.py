"""How many bytes a file may have: given as a size, as bits a weight, or left by a device's memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from signround_edge.arguments import bytes_of
from signround_edge.errors import UserError
from signround_edge.planning.memory import Needs


@dataclass(frozen=True)
class Budget:
    """Exactly one of the first three.

    Attributes:
        size: bytes of the file.
        bits_per_weight: of all tensors' data.
        memory: bytes for file, cache and buffers together.
        asked: as the user gave it, for messages.
    """

    size: int | None = None
    bits_per_weight: float | None = None
    memory: int | None = None
    asked: str = ""

    @classmethod
    def of(
        cls, target_size: str | int | None, target_bpw: float | None, memory: str | int | None, memory_of: str | None
    ) -> Budget:
        """From what the user gave, exactly one of the first three.

        Args:
            memory_of: name of the device whose memory that is, for messages.
        """
        if [target_size, target_bpw, memory].count(None) != 2:
            raise UserError(
                "give one of --target-size, --target-bpw, --device and --memory: it says how large the file may be"
            )
        if target_size is not None:
            return cls(size=bytes_of("--target-size", str(target_size)), asked=f"--target-size {target_size}")
        if target_bpw is not None:
            if not 0 < target_bpw <= 32:
                raise UserError(f"--target-bpw {target_bpw} must be above 0 and at most 32")
            return cls(bits_per_weight=float(target_bpw), asked=f"--target-bpw {target_bpw}")
        asked = f"--memory {memory}" if memory_of is None else f"--device {memory_of}"
        return cls(memory=bytes_of("--memory", str(memory)), asked=asked)

    def file_bytes(self, weights: int, head: int, needs: Needs) -> int:
        """What the file may have.

        Args:
            weights: parameters of the model.
            head: bytes of the file that are no tensor's.
            needs: of the runtime.
        """
        if self.size is not None:
            return self.size
        if self.bits_per_weight is not None:
            return head + int(self.bits_per_weight * weights / 8)
        assert self.memory is not None
        left = self.memory - needs.total
        if left <= 0:
            raise UserError(
                f"{self.asked}: the context alone takes {needs.total / 1e6:.1f} MB (cache {needs.cache / 1e6:.1f}, "
                f"buffers {needs.buffers / 1e6:.1f}) of {self.memory / 1e6:.1f} MB; give a smaller --context"
            )
        return left

    def holding(self, file_bytes: int, weights: int, head: int, needs: Needs) -> str:
        """The least budget of this kind that such a file keeps, as an option of the command line."""
        if self.size is not None:
            return f"--target-size {file_bytes}"
        if self.bits_per_weight is not None:
            return f"--target-bpw {math.ceil(8e3 * (file_bytes - head) / weights) / 1e3}"
        return f"--memory {math.ceil((file_bytes + needs.total) / 1e6)}M"
