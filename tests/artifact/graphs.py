"""A graph of the artifact in ``builders``, made by hand."""

from plyweight.artifact import Graph, Model, Module, Norm, Port, Quantizer

WIDTHS = (2, 3, 8)  # of the artifact in builders


def graph(**changes):
    """A graph of the artifact in ``builders``, with weights ``conv`` and, in groups, ``fc``."""
    return Graph(
        **{
            "models": (
                Model(bit_widths=(2, 3), slots=("conv.levels", "conv.in.step"), data=b"narrow"),
                Model(bit_widths=(8,), slots=("conv.levels", "table"), data=b"wide"),
            ),
            "inputs": (Port("image", "float32", ("batch", 2, 8, 8)),),
            "outputs": (Port("logits", "float32", ("batch", 5)),),
            "modules": {
                "conv": Module(param="conv.weight", norm=Norm("bn", 1e-5), input="conv.in")
            },
            "quantizers": {
                "conv.in": Quantizer(
                    steps={2: 0.1, 3: 0.25, 8: 1e-7}, zero_points={2: 0, 3: 7, 8: 255}
                )
            },
            "tensors": {"table": "fc.bias"},
        }
        | changes
    )
