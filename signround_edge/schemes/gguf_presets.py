"""llama.cpp's presets: which block type each matrix of a model gets. Attention values and down projections are more
sensitive than the rest, so most presets give some of them more bits.

Source: `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's llama-quant.cpp. The IQ presets follow
it as it is with an importance matrix (calibration is one). Q4_0 and Q5_0 follow it as it is without: with one it gives
the first eighth of the down projections Q4_1 or Q5_1, against a failure of its own search that ours does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from signround_edge.formats import get_grid


class Role(Enum):
    """What a weight matrix is for."""

    EMBEDDING = "embedding"
    OUTPUT = "output"  # the head, or the embedding tied to it
    ATTENTION_Q = "attention_q"
    ATTENTION_K = "attention_k"
    ATTENTION_V = "attention_v"  # also a fused matrix that holds V
    ATTENTION_OUTPUT = "attention_output"
    FFN_UP = "ffn_up"
    FFN_GATE = "ffn_gate"
    FFN_DOWN = "ffn_down"
    OTHER = "other"


@dataclass(frozen=True)
class Place:
    """A matrix's role, and where rules count it. Every expert's matrix has the same place.

    Attributes:
        layer: for those of decoder blocks, the block's index; where `layers` is given, its number among so many of its
            role: not every block of a hybrid model has one.
        number: its number among the matrices of its role, whatever block they are in.
        expert: whether it is one expert's of many.
    """

    role: Role
    layer: int = 0
    layers: int | None = None
    number: int = 0
    expert: bool = False


@dataclass(frozen=True)
class ModelTraits:
    """What the rules ask about the model.

    Attributes:
        layers: number of decoder blocks.
        query_groups: query heads that share one key head; 0 where the first block has no attention.
        falcon: whether it is a Falcon, which has rules of its own.
        experts: experts a block; 0 where there are none. Eight of them (Mixtral) have rules of their own.
    """

    layers: int = 1
    query_groups: int = 1
    falcon: bool = False
    experts: int = 0

    @property
    def llama_70b(self) -> bool:
        """80 blocks with shared key heads: llama.cpp takes such a model for a 70B."""
        return self.layers == 80 and self.query_groups > 1


Rule = Callable[[int, ModelTraits], str | None]


def _always(name: str) -> Rule:
    return lambda layer, model: name


def _grouped(name: str, otherwise: str | None = None) -> Rule:
    """`name` where at least four query heads share a key head: V is then small."""
    return lambda layer, model: name if model.query_groups >= 4 else otherwise


def _grouped_or_experts(name: str, otherwise: str) -> Rule:
    return lambda layer, model: name if model.query_groups >= 4 or model.experts >= 4 else otherwise


def _first(share: int, name: str) -> Rule:
    """`name` in the first 1/share of the blocks."""
    return lambda layer, model: name if layer < model.layers // share else None


def _more_bits(layer: int, model: ModelTraits) -> bool:
    """The first and the last eighth of the blocks, and every third one between."""
    eighth = model.layers // 8
    return layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2


def _where_more_bits(name: str) -> Rule:
    return lambda layer, model: name if _more_bits(layer, model) else None


def _where_fewer_bits(name: str) -> Rule:
    """`name` in all blocks but the first and the last eighth."""
    return lambda layer, model: name if model.layers // 8 <= layer < 7 * model.layers // 8 else None


def _iq3_m_down(layer: int, model: ModelTraits) -> str | None:
    more = layer < model.layers // 8 or (model.experts == 8 and _more_bits(layer, model))
    return "Q4_K" if more else None


def _q3_k_m_down(layer: int, model: ModelTraits) -> str | None:
    if layer < model.layers // 16:
        return "Q5_K"
    return "Q4_K" if not model.falcon or _more_bits(layer, model) else None


def _q4_k_m_down(layer: int, model: ModelTraits) -> str | None:
    if not model.falcon:
        return "Q6_K" if _more_bits(layer, model) else None
    if layer < model.layers // 16:
        return "Q6_K"
    return "Q5_K" if _more_bits(layer, model) else None


def _unless_falcon(rule: Rule, falcon: str | None = None) -> Rule:
    return lambda layer, model: falcon if model.falcon else rule(layer, model)


def _of_eight_experts(name: str | None, others: Rule) -> Rule:
    return lambda layer, model: name if model.experts == 8 else others(layer, model)


@dataclass(frozen=True)
class Preset:
    """One row: a base type, and rules for the roles that may differ. All types are names for `get_grid`.

    Attributes:
        base: type of everything without a rule; "*" in it stands for the number of values a row.
        rules: role → rule; a rule's None means the base type.
        embedding: type of an untied embedding; None is the base type.
        output: type of the head, or of the embedding that is tied to it.
        smallest: whether it is one of those below 3 bits, whose V and K with eight experts and in a 70B are no
            exceptions, and whose down projections are counted as they come.
        experts: type of experts' matrices; None is that of others.
    """

    base: str
    rules: Mapping[Role, Rule] = field(default_factory=dict)
    embedding: str | None = None
    output: str = "Q6_K"
    smallest: bool = False
    experts: str | None = None

    def format_of(self, place: Place, model: ModelTraits, cols: int) -> str:
        """The type for a matrix with rows of `cols` values, before any fallback for rows that it does not divide."""
        base = self.base.replace("*", str(cols))
        if place.role is Role.OUTPUT:
            return "Q8_0" if model.falcon or cols % get_grid(base).row_multiple else self.output
        if place.role is Role.EMBEDDING:
            return self.embedding or base
        if place.expert and self.experts:
            return self.experts
        if self.smallest:
            rule = self.rules.get(place.role)
            return (rule(place.number, model) if rule else None) or base
        if model.experts == 8 and place.role in (Role.ATTENTION_K, Role.ATTENTION_V):
            return "Q8_0"  # small beside eight experts
        rule = self.rules.get(place.role)
        counted = model if place.layers is None else replace(model, layers=place.layers)
        name = (rule(place.layer, counted) if rule else None) or base
        if place.role is Role.ATTENTION_V and model.llama_70b and name in ("Q3_K", "Q4_K"):
            return "Q5_K"
        return name


_V, _OUT, _DOWN = Role.ATTENTION_V, Role.ATTENTION_OUTPUT, Role.FFN_DOWN
_Q, _K = Role.ATTENTION_Q, Role.ATTENTION_K
_OUT_Q5_K = _of_eight_experts("Q5_K", lambda layer, model: None)


def _below_3_bits(base: str, more: str, out: str | None = None, embedding: str | None = None) -> Preset:
    """Presets IQ1 and IQ2: `more` for V and the first eighth of the down projections, `out` for attention outputs."""
    rules = {
        _V: _grouped_or_experts("Q4_K", more),
        _K: _of_eight_experts("Q4_K", lambda layer, model: None),
        _DOWN: _first(8, more),
        _OUT: _of_eight_experts("Q5_K", lambda layer, model: out),
    }
    return Preset(base, rules, embedding=embedding or more, output="Q5_K", smallest=True)


GGUF_PRESETS: dict[str, Preset] = {
    "q1_0": Preset("Q1_0"),
    "tq1_0": Preset("TQ1_0", embedding="Q4_K"),
    "tq2_0": Preset("TQ2_0", embedding="Q4_K"),
    "q2_0": Preset("Q2_0", embedding="Q4_K"),
    "q4_0": Preset("Q4_0"),
    "q4_1": Preset("Q4_1"),
    "q5_0": Preset("Q5_0"),
    "q5_1": Preset("Q5_1"),
    "q8_0": Preset("Q8_0", output="Q8_0"),
    "q2_k": Preset(
        "Q2_K",
        {
            _V: _grouped("Q4_K", "Q3_K"),
            _DOWN: _always("Q3_K"),
            _OUT: _of_eight_experts("Q5_K", _unless_falcon(_always("Q3_K"))),
        },
    ),
    "q2_k_s": Preset("Q2_K", {_V: _grouped("Q4_K"), _DOWN: _first(8, "Q4_K")}),
    "q3_k_s": Preset("Q3_K", {_OUT: _OUT_Q5_K}),
    "q3_k_m": Preset(
        "Q3_K",
        {
            _V: lambda layer, model: "Q5_K" if layer < 2 else "Q4_K",
            _DOWN: _q3_k_m_down,
            _OUT: _of_eight_experts("Q5_K", _unless_falcon(_always("Q4_K"))),
        },
    ),
    "q3_k_l": Preset(
        "Q3_K",
        {
            _V: _always("Q5_K"),
            _DOWN: _unless_falcon(_always("Q5_K"), "Q4_K"),
            _OUT: _of_eight_experts(None, _unless_falcon(_always("Q5_K"), "Q4_K")),
        },
    ),
    "q4_k_s": Preset(
        "Q4_K",
        {
            _V: lambda layer, model: "Q5_K" if layer < 4 else None,
            _DOWN: _unless_falcon(_first(8, "Q5_K")),
            _OUT: _OUT_Q5_K,
        },
    ),
    "q4_k_m": Preset("Q4_K", {_V: _where_more_bits("Q6_K"), _DOWN: _q4_k_m_down, _OUT: _OUT_Q5_K}),
    "q5_k_s": Preset("Q5_K"),
    "q5_k_m": Preset("Q5_K", {_V: _where_more_bits("Q6_K"), _DOWN: _where_more_bits("Q6_K")}),
    "q6_k": Preset("Q6_K"),
    "iq1_s": _below_3_bits("IQ1_S", "Q2_K", out="IQ2_XXS"),
    "iq1_m": _below_3_bits("IQ1_M", "Q2_K", out="IQ2_XXS"),
    "iq2_xxs": _below_3_bits("IQ2_XXS", "Q2_K"),
    "iq2_xs": _below_3_bits("IQ2_XS", "Q2_K"),
    "iq2_s": _below_3_bits("IQ2_XS", "IQ3_S", out="IQ3_S"),
    "iq2_m": _below_3_bits("IQ2_S", "IQ3_S", out="IQ3_S"),
    "iq3_xxs": Preset(
        "IQ3_XXS",
        {
            _V: _grouped("Q4_K"),
            _Q: _always("IQ2_S"),
            _K: _always("IQ2_S"),
            _OUT: _of_eight_experts("Q5_K", _unless_falcon(_always("IQ3_S"))),
        },
        embedding="IQ3_S",
        output="Q5_K",
    ),
    "iq3_xs": Preset(
        "IQ3_S",
        {
            _V: _grouped("Q4_K"),
            _Q: _always("IQ3_XXS"),
            _K: _always("IQ3_XXS"),
            Role.FFN_GATE: _where_fewer_bits("IQ3_XXS"),
            Role.FFN_UP: _where_fewer_bits("IQ3_XXS"),
            _OUT: _OUT_Q5_K,
        },
    ),
    "iq3_s": Preset("IQ3_S", {_V: _grouped("Q4_K"), _OUT: _OUT_Q5_K}),
    "iq3_m": Preset(
        "IQ3_S",
        {
            _V: _always("Q4_K"),
            _DOWN: _iq3_m_down,
            _OUT: _of_eight_experts("Q5_K", _unless_falcon(_always("Q4_K"))),
        },
    ),
    "mxfp4_moe": Preset("Q8_0", output="Q8_0", experts="MXFP4"),
    "iq4_nl": Preset("IQ4_NL", {_V: _grouped("Q5_K"), _OUT: _OUT_Q5_K}),
    "iq4_xs": Preset("IQ4_XS", {_V: _grouped("Q5_K"), _OUT: _OUT_Q5_K}),
}

# Where a row is no multiple of the block. llama.cpp leaves what even these do not divide in F16.
GGUF_FALLBACK = {
    "Q2_0": "Q4_0",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "IQ1_S": "IQ4_NL",
    "IQ1_M": "IQ4_NL",
    "IQ2_XXS": "IQ4_NL",
    "IQ2_XS": "IQ4_NL",
    "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL",
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
}
