"""Run by a test in a process of its own: what llama-quantize's own loader makes of an importance matrix, as JSON.

    python llama_imatrix_loader.py libllama-common.so FILE

`bool common_imatrix_load(const std::string &, common_imatrix &)` is C++, so the objects are laid out here as libstdc++
has them (x86-64). Source: common/imatrix-loader.h of llama.cpp.
"""

from __future__ import annotations

import ctypes
import json
import struct
import sys

LOAD = "_Z19common_imatrix_loadRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEER14common_imatrix"


def words(address: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", ctypes.string_at(address, 8 * count))


def string(address: int) -> str:
    data, length = words(address, 2)
    return ctypes.string_at(data, length).decode()


def vector(address: int, code: str) -> list[float]:
    begin, end = words(address, 2)
    return list(struct.unpack(f"<{(end - begin) // struct.calcsize(code)}{code}", ctypes.string_at(begin, end - begin)))


def entries(node: int, found: dict[str, dict[str, list[float]]]) -> None:
    """std::map<std::string, {vector<float> sums, vector<int64_t> counts}>: colour, parent, left, right, value."""
    if node:
        _, _, left, right = words(node, 4)
        entries(left, found)
        found[string(node + 32)] = {"sums": vector(node + 64, "f"), "counts": vector(node + 88, "q")}
        entries(right, found)


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    path = sys.argv[2].encode()
    characters = ctypes.create_string_buffer(path)
    name = ctypes.create_string_buffer(struct.pack("<QQ16x", ctypes.addressof(characters), len(path)), 32)
    imatrix = ctypes.create_string_buffer(1024)
    header = ctypes.addressof(imatrix) + 8  # of the map, behind its empty comparison; its ends point to itself
    struct.pack_into("<QQ", imatrix, 24, header, header)
    load = getattr(library, LOAD)
    load.restype = ctypes.c_bool
    load.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    accepted = load(name, imatrix)
    found: dict[str, dict[str, list[float]]] = {}
    entries(words(header + 8, 1)[0], found)
    chunk_count, chunk_size, is_legacy, has_metadata = struct.unpack_from("<ii??", imatrix, 72)
    document = {"accepted": accepted, "has_metadata": has_metadata, "is_legacy": is_legacy, "entries": found}
    print(json.dumps({**document, "chunk_count": chunk_count, "chunk_size": chunk_size}))


if __name__ == "__main__":
    main()
