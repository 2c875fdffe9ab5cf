"""From a torch module to an ONNX graph with slots for its weights (torch, onnx).

    skeleton    the float network of a layered one, exported once
    weights     nodes that compute with layered weights read levels, scales and biases
    marks       where activations are rounded, and the QuantizeLinear that it becomes
    edges       grids of 8 bits where the runtime would compute in float for want of one
    places      the modules of the torch network that give such values
    ranges      what these grids are, from example inputs
    build       all of that, one after the other
    fitting     the torch network rounds the same

What has no weights in it is the same at every bit-width, so the artifact carries it once. Needs
onnx, onnxscript and onnxruntime (the extra ``[onnx]``); nothing here imports them but when
``plyweight.pack`` is given example inputs.
"""
