"""Gathering the gradients of every class and block of examples into factors and rows."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ntkscope.kernel.factor import OuterFactor
from ntkscope.kernel.layout import Layout, allows, by_example
from ntkscope.kernel.routes import Routes, UnlikeProbe
from ntkscope.kernel.rules.use import OuterUse, Use
from ntkscope.kernel.storage import Target, num_rows, resolve
from ntkscope.kernel.watch import WeightWatch

Key = tuple[int, int]  # of a use: its call, and its place in the call


class Store:
    """Where the gradients of all examples go.

    Args:
        routes: From `probe_routes`.
        num_examples: n of all blocks together.
    """

    def __init__(self, routes: Routes, num_examples: int) -> None:
        self.routes, self.num_examples = routes, num_examples
        self._rows: dict[str, Tensor] = {}
        self._grads: dict[Key, Tensor] = {}  # [examples, classes, units, positions]
        self._inputs: dict[Key, list[Tensor]] = {}  # by block
        self._kinds: dict[Key, tuple[str, int, int, bool]] = {}

    def rows_of(self, name: str, num_classes: int) -> Tensor:
        """Get the rows of a parameter, zero at first.

        Args:
            name: The parameter.
            num_classes: C.

        Returns:
            Shape `(n, C, entries)`.
        """
        if name not in self._rows:
            parameter = self.routes.parameters[name]
            shape = (self.num_examples, num_classes, parameter.numel())
            self._rows[name] = torch.zeros(shape, dtype=self.routes.dtype, device=parameter.device)
        return self._rows[name]

    def add_grads(self, key: Key, examples: slice, index: int, grads: Tensor, num_classes: int) -> None:
        """Keep one class's output gradients of some examples; classes that never come stay zero.

        Args:
            key: The use.
            examples: Which.
            index: The class.
            grads: Shape `(examples, units, positions)`.
            num_classes: C.
        """
        if key not in self._grads:
            self._grads[key] = grads.new_zeros(self.num_examples, num_classes, *grads.shape[1:])
        self._grads[key][examples, index] = grads

    def add_inputs(self, key: Key, inputs: Tensor, target: Target, *, transposed: bool) -> None:
        """Keep the activations of a block of examples.

        Args:
            key: The use.
            inputs: From `OuterUse.inputs`.
            target: The part of a parameter that is used.
            transposed: Whether the parameter is [inputs, units].
        """
        assert target.name is not None  # computed weights are kept as rows
        self._inputs.setdefault(key, []).append(inputs)
        self._kinds[key] = (target.name, target.part.start, target.part.stop, transposed)

    def factors(self) -> dict[str, list[OuterFactor]]:
        """Put positions of the same part of a parameter side by side, and let go of what was gathered.

        Returns:
            Factors by parameter.
        """
        groups: dict[tuple[str, int, int, bool, bool], list[Key]] = {}
        for key in self._grads:
            is_token = self._inputs[key][0].ndim == 2
            groups.setdefault((*self._kinds[key], is_token), []).append(key)
        found: dict[str, list[OuterFactor]] = {}
        for (name, start, stop, transposed, _), keys in groups.items():
            grads = _join([self._grads.pop(key) for key in keys], dim=3)
            inputs = _join([_join(self._inputs.pop(key), dim=0) for key in keys], dim=1)
            found.setdefault(name, []).append(OuterFactor(grads, inputs, slice(start, stop), transposed).separated())
        return found

    def rows(self) -> dict[str, Tensor]:
        """Get all rows.

        Returns:
            Rows by parameter.
        """
        return self._rows


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


class Collector:
    """Brings the gradients of one block of examples into the store.

    Args:
        store: Where to.
        watch: What was seen of the block.
        examples: Which of all examples the block is.
        num_classes: C.
    """

    def __init__(self, store: Store, watch: WeightWatch, examples: slice, num_classes: int) -> None:
        self.store, self.watch, self.examples, self.num_classes = store, watch, examples, num_classes
        self.routes, self.num_examples = store.routes, examples.stop - examples.start
        self._computed: dict[int, tuple[Tensor, Tensor]] = {}  # id of a computed weight: the weight, its rows
        self._inputs: dict[Key, Tensor] = {}
        self._targets = {key: resolve(use.weight, watch, self.routes.ruled_parameters) for key, _, _, use in self._uses()}

    def _uses(self) -> Iterator[tuple[Key, int, Layout, Use]]:
        for i, (call, planned) in enumerate(zip(self.watch.calls, self.routes.plan.calls, strict=True)):
            if planned.layout is not None:
                for j, use in enumerate(call.uses):
                    yield (i, j), i, planned.layout, use

    def add_class(self, index: int, grads: list[Tensor | None]) -> None:
        """Add one class.

        Args:
            index: The class.
            grads: One per call, None where it reaches nothing.

        Raises:
            UnlikeProbe: If the layouts that the plan names do not fit.
        """
        for grad, call, planned in zip(grads, self.watch.calls, self.routes.plan.calls, strict=True):
            if grad is None:
                continue
            if planned.layout is None:
                raise UnlikeProbe("the result of a layer reaches the output for some examples only")
            if not all(use.fits(planned.layout, call.shape, self.num_examples) for use in call.uses):
                raise UnlikeProbe(f"`{call.name}` has an output of shape {call.shape} for {self.num_examples} examples")
        cast = [None if grad is None else grad.to(self.routes.dtype) for grad in grads]
        for key, i, layout, use in self._uses():
            grad = cast[i]
            if grad is not None:
                self._add_use(key, index, layout, use, grad)

    def check_apart(self, grads: list[Tensor | None], mine: Tensor) -> None:
        """Check that gradients of some examples' outputs stay in these examples' rows, in every call's layout.

        A model may sort, route or unpad its examples; then a layout that two examples of the probe had is not that of all.

        Args:
            grads: One per call, of the outputs of some examples.
            mine: Which, `(n,)`.

        Raises:
            UnlikeProbe: If a gradient reaches another example's rows.
        """
        for grad, call, planned in zip(grads, self.watch.calls, self.routes.plan.calls, strict=True):
            if grad is None or planned.layout is None or not allows(planned.layout, call.shape, self.num_examples):
                continue  # shapes are checked with every class
            others = by_example(grad, planned.layout, self.num_examples)[~mine.to(grad.device)]
            if bool(others.any()):
                raise UnlikeProbe(f"the rows of `{call.name}` belong to other examples than they did on the probe")

    def _add_use(self, key: Key, index: int, layout: Layout, use: Use, grad: Tensor) -> None:
        target, n = self._targets[key], self.num_examples
        is_factor = target.name is not None and self.routes.plan.storage[target.name] == "factors"
        if isinstance(use, OuterUse) and key not in self._inputs:
            inputs = use.inputs(layout, n)
            self._inputs[key] = inputs.to(self.routes.dtype) if inputs.is_floating_point() else inputs
            if is_factor:
                self.store.add_inputs(key, self._inputs[key], target, transposed=use.transposed != target.transposed)
        if is_factor:
            assert isinstance(use, OuterUse)  # `choose_storage` said so
            self.store.add_grads(key, self.examples, index, use.grads(grad, layout, n), self.num_classes)
            return
        rows = use.rows(grad, layout, n, self._inputs.get(key))
        if target.name is None:
            if id(use.weight) not in self._computed:
                self._computed[id(use.weight)] = (use.weight, rows.new_zeros(n, self.num_classes, use.weight.numel()))
            self._computed[id(use.weight)][1][:, index] += rows
            return
        kept = self._kept_rows(target.name)[:, index].view(n, num_rows(self.routes.parameters[target.name]), -1)
        if target.transposed:
            rows = rows.view(n, *use.weight.shape).mT.reshape(n, -1)
        kept[:, target.part] += rows.view(n, target.part.stop - target.part.start, -1)

    def _kept_rows(self, name: str) -> Tensor:
        return self.store.rows_of(name, self.num_classes)[self.examples]

    def finish(self) -> None:
        """Pull the rows of computed weights back to the parameters they come from."""
        parameters = self.routes.parameters
        for weight, rows in self._computed.values():
            names = sorted(self.watch.roots(weight))
            kept = [self._kept_rows(name) for name in names]
            for i in range(self.num_examples):
                for c in range(self.num_classes):
                    # One small backward pass per output: parametrizations have no batched derivative (weight_norm, for one).
                    grads = torch.autograd.grad(
                        weight,
                        [parameters[name] for name in names],
                        rows[i, c].view_as(weight).to(weight),
                        retain_graph=True,
                        allow_unused=True,
                    )
                    for own, grad in zip(kept, grads, strict=True):
                        if grad is not None:
                            own[i, c] += grad.flatten()
