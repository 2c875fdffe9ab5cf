"""Scopes: which modules of the torch network a node of the graph comes from."""

import ast

import onnx_ir as ir

__all__ = ["scopes_of"]

_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch.onnx notes the modules of a node


def scopes_of(node: ir.Node) -> list[str]:
    """The modules that ``node`` stands in, outermost first; the model itself is ""."""
    text = node.metadata_props.get(_SCOPES)
    scopes = [str(scope) for scope in ast.literal_eval(text)][:-1] if text else [""]
    # A module that is called again is noted as "name@1".
    return [scope.split("@")[0] for scope in scopes] or [""]
