"""All rules, by the name of the torch function they are for."""

from collections.abc import Callable

from ntkscope.kernel.rules import conv, embedding, linear, recurrent, scale
from ntkscope.kernel.rules.use import Seen

Rule = Callable[..., Seen]

RULES: dict[str, Rule] = {
    "linear": linear.linear,
    "matmul": linear.matmul,
    "mm": linear.matmul,
    "__rmatmul__": lambda watch, func, args, kwargs: linear.matmul(watch, lambda a, b: a @ b, args[::-1], kwargs),
    "addmm": linear.addmm,
    "bilinear": linear.bilinear,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), conv.convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), conv.transposed_convolution),
    "embedding": embedding.embedding,
    "embedding_bag": embedding.embedding_bag,
    "__getitem__": embedding.lookup,
    **dict.fromkeys(("add", "add_", "__iadd__", "__radd__"), scale.add),
    **dict.fromkeys(("sub", "sub_", "subtract", "__isub__"), scale.subtract),
    **dict.fromkeys(("mul", "mul_", "multiply", "__imul__", "__rmul__"), scale.multiply),
    **dict.fromkeys(("div", "true_divide", "divide", "__truediv__"), scale.divide),
    **dict.fromkeys(("expand", "expand_as", "repeat", "broadcast_to"), scale.broadcast),
    "prelu": scale.prelu,
    **dict.fromkeys(("layer_norm", "rms_norm"), scale.layer_norm),
    **dict.fromkeys(scale.CHANNEL_NORMS, scale.channel_norm),
    **dict.fromkeys(recurrent.STEPS, recurrent.recurrent),
    **dict.fromkeys((f"{name}_cell" for name in recurrent.STEPS), recurrent.recurrent_cell),
}
# The second argument only lends its shape or type.
LIKES = {"type_as", "view_as", "reshape_as"}
