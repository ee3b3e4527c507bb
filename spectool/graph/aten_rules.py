"""Which ATen operations are affine in what they read: the same table as for ONNX, as data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from spectool.graph.rules import Rule


def _aten(names: str, rule: Rule) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


ATEN_RULES: Mapping[str, Rule] = {
    **_aten(
        "alias clone contiguous detach _to_copy to lift_fresh lift_fresh_copy neg dropout _neg_view positive",
        Rule("first", "neutral"),
    ),
    **_aten(
        "view _unsafe_view reshape _reshape_alias view_copy permute transpose t squeeze unsqueeze flatten "
        "unflatten numpy_T movedim pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle flip roll "
        "rot90 squeeze_copy unsqueeze_copy permute_copy transpose_copy",
        Rule("first", "move"),
    ),
    **_aten(
        "slice select split split_with_sizes chunk unbind narrow index_select gather tril triu diagonal "
        "tensor_split unsafe_split unsafe_chunk slice_copy select_copy split_copy unbind_copy diag_embed "
        "masked_fill index",
        Rule("first", "select"),
    ),
    **_aten(
        "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
        "replication_pad2d replication_pad3d _pad_circular pad",
        Rule("first", "pad", same="neutral"),
    ),
    **_aten(
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d",
        Rule("first", "avgpool"),
    ),
    **_aten("mean", Rule("first", "avgpool", same="neutral")),
    **_aten(
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d "
        "_upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d "
        "upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        Rule("first", "upsample"),
    ),
    **_aten(
        "sum expand expand_copy expand_as repeat repeat_interleave", Rule("first", "mix", same="neutral")
    ),
    **_aten("cumsum im2col col2im unfold as_strided", Rule("first", "mix")),
    **_aten("div", Rule("first", "mix", same="scale")),
    **_aten("mul", Rule("either", "mix", same="scale")),
    **_aten(
        "mm bmm matmul mv dot einsum linear convolution _convolution",
        Rule("either", "mix", operator="linear"),
    ),
    **_aten("add sub", Rule("join", "mix", same="neutral")),
    **_aten("rsub", Rule("join", "mix")),
    **_aten("cat stack concat concatenate hstack vstack", Rule("join", "mix", alone="select")),
    **_aten("slice_scatter select_scatter copy", Rule("join", "mix")),
    **_aten("where", Rule("mask", "mix", same="select")),
    **_aten(
        "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty empty_permuted",
        Rule("shape", "mix"),
    ),
}
"""ATen operations by packet name; what is missing here is a boundary."""

RANDOM = ("rand", "normal", "bernoulli", "multinomial", "poisson", "exponential", "dropout")
"""Beginnings of the names of operations that draw numbers: never constant."""


def packet(name: str) -> str:
    """Return ``aten.view`` for ``aten.view.default``."""
    return ".".join(name.split(".")[:2])


def rules_for(names: Iterable[str]) -> dict[str, Rule]:
    """Return the rules of the overloads named, by their full names.

    Sums and products have overloads with a number in place of the second tensor; those are linear in the first.
    """
    found = {}
    for name in names:
        rule = ATEN_RULES.get(packet(name))
        if rule is not None:
            found[name] = rule
    return found
