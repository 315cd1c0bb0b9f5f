"""nn.Linear on inputs of shape (examples, ..., inputs)."""

from torch import Tensor, nn

from ntkscope.kernel.capture import LayerCall
from ntkscope.kernel.rules.factor import PositionFactor, bias_factor


class LinearRule:
    """Gradients are outer products of layer input and output gradient."""

    def matches(self, module: nn.Module) -> bool:
        """Accept Linear, and subclasses that keep its forward pass.

        Args:
            module: A layer.

        Returns:
            Whether the rule applies.
        """
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward

    def factors(self, call: LayerCall, output_grads: Tensor) -> dict[str, list[PositionFactor]]:
        """Factor one call.

        Args:
            call: What the layer saw.
            output_grads: Shape `(classes, examples, ..., units)`.

        Returns:
            Factors of `weight` and `bias`.
        """
        num_examples = call.input.shape[0]
        # [examples, ..., inputs] -> [examples, positions, inputs]
        activations = call.input.reshape(num_examples, -1, call.input.shape[-1])
        grads = output_grads.reshape(output_grads.shape[0], num_examples, -1, output_grads.shape[-1]).transpose(0, 1)
        units = slice(0, grads.shape[-1])
        return {"weight": [PositionFactor(units, activations, grads)], "bias": [bias_factor(grads)]}
