"""Hand-made rows for the tests of writers and tables: every status, hostile names, nothing computed."""

from __future__ import annotations

from spectool.report.row import Report, Row


def conv_row() -> Row:
    return Row(
        layer="layer1.0.conv1.weight",
        level="layer",
        kind="conv2d",
        weights=("layer1.0.conv1.weight",),
        weight_shape=(64, 3, 7, 7),
        input_shape=(3, 224, 224),
        output_shape=(64, 112, 112),
        sigma=(15.916402310987653, 12.25, 0.1 + 0.2),
        sigma_lower=(15.91640230998, 12.2499999, 0.3),
        sigma_upper=(15.91640233, 12.250001, None),
        upper_kind="symbol",
        residual=3.2e-07,
        multiplicity=1,
        multiplicity_exact=False,
        converged=True,
        fro=38.75,
        stable_rank=5.927,
        method="lanczos",
        matvecs=412,
        seconds=1.734,
        why="too large for a dense solver",
    )


def batchnorm_row() -> Row:
    return Row(
        layer="layer1.0.bn1.weight",
        level="layer",
        kind="batchnorm",
        weights=("layer1.0.bn1.weight", "layer1.0.bn1.running_var"),
        weight_shape=((64,), (64,)),
        input_shape=(64, 112, 112),
        output_shape=(64, 112, 112),
        sigma=(1.5, 1.5, 1.5),
        sigma_lower=(1.5, 1.5, 1.5),
        sigma_upper=(1.5, 1.5, 1.5),
        upper_kind="exact",
        multiplicity=12544,
        multiplicity_exact=True,
        converged=True,
        fro=896.0,
        stable_rank=356808.0,
        method="exact:batchnorm",
        matvecs=0,
        seconds=0.001,
        operators=0,
        maximal=False,
    )


def pair_row() -> Row:
    return Row(
        layer="layer1.0.conv1.weight + layer1.0.bn1.weight",
        level="composed",
        kind="conv2d+batchnorm",
        weights=("layer1.0.conv1.weight", "layer1.0.bn1.weight"),
        weight_shape=((64, 3, 7, 7), (64,)),
        input_shape=(3, 224, 224),
        output_shape=(64, 112, 112),
        sigma=(9.875, 8.5, 8.5),
        sigma_lower=(9.874999, 8.49, 8.49),
        sigma_upper=(9.876, 8.51, 8.51),
        upper_kind="probabilistic",
        residual=1e-06,
        multiplicity=2,
        multiplicity_exact=False,
        converged=False,
        fro=None,
        stable_rank=None,
        method="lanczos",
        matvecs=3300,
        seconds=12.5,
    )


def any_size_row() -> Row:
    return Row(
        layer="head.weight",
        level="layer",
        kind="conv2d",
        weights=("head.weight",),
        weight_shape=(10, 64, 3, 3),
        sigma=(2.0,),
        sigma_lower=(1.999,),
        sigma_upper=(2.001,),
        upper_kind="symbol-any-size",
        converged=True,
        method="symbol",
        matvecs=0,
        seconds=0.2,
        assumed=("infinite grid, stride 1, zero padding", "groups=1"),
    )


def linear_row() -> Row:
    return Row(
        layer="fc.weight",
        level="layer",
        kind="linear",
        weights=("fc.weight",),
        weight_shape=(2, 512),
        input_shape=(512,),
        output_shape=(2,),
        sigma=(3.5, 1.25),
        sigma_lower=(3.4999999999999996, 1.2499999999999998),
        sigma_upper=(3.5000000000000004, 1.2500000000000002),
        upper_kind="exact",
        residual=2.220446049250313e-16,
        multiplicity=1,
        multiplicity_exact=True,
        converged=True,
        fro=3.7165171868296265,
        stable_rank=1.1275510204081634,
        method="dense",
        matvecs=0,
        seconds=0.004,
        note="k clamped to 2, all there are",
    )


def skipped_row() -> Row:
    return Row(
        layer="lstm.weight_ih_l0[0:64]",
        level="layer",
        kind="lstm",
        weights=("lstm.weight_ih_l0",),
        weight_shape=(256, 64),
        status="skipped",
        note="quantised to 4 bits in a layout that is not known",
    )


def failed_row() -> Row:
    return Row(
        layer="broken.weight",
        level="layer",
        kind="linear",
        weights=("broken.weight",),
        weight_shape=(4, 4),
        input_shape=(4,),
        output_shape=(4,),
        seconds=0.0,
        status="failed",
        note="broken.weight holds 1 NaN or infinite values of 16",
    )


def nonlinear_row() -> Row:
    return Row(
        layer="norm.weight",
        level="layer",
        kind="layernorm",
        weights=("norm.weight",),
        weight_shape=(64,),
        status="nonlinear",
        note="a layer norm divides by a statistic of its input",
        operators=0,
    )


SETTINGS = {
    "k": 3,
    "method": "auto",
    "tol": 1e-05,
    "seed": 0,
    "layers": [],
    "input_shape": {"x": [1, 3, 224, 224]},
}


def small_report(*rows: Row) -> Report:
    """A report of one row of every sort, or of the rows given."""
    chosen = rows or (
        conv_row(),
        batchnorm_row(),
        pair_row(),
        any_size_row(),
        linear_row(),
        skipped_row(),
        failed_row(),
        nonlinear_row(),
    )
    return Report(chosen, "net.pt", "torch-zip", None, SETTINGS, "0.1.0", ("took 'state_dict'",))
