"""All layer rules."""

from ntkscope.kernel.rules.conv import Conv2dRule
from ntkscope.kernel.rules.factor import Rule
from ntkscope.kernel.rules.linear import LinearRule

RULES: tuple[Rule, ...] = (LinearRule(), Conv2dRule())
