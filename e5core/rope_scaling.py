"""Texts longer than a model was trained on, at inference alone: other rotary frequencies, another base, another window.

    linear:F   every frequency divided by F (arXiv 2306.15595)
    ntk:F      the base times F^(d / (d - 2)): the highest of the d / 2 frequencies stays, the lowest is divided by F
    dynamic:F  the same by F L / n - (F - 1) for a text of L tokens, where n is the trained length; shorter ones stay
    yarn:F     frequencies that turn more than 32 times within the trained length stay, those that turn less than once
               are divided by F, others by something between; attention's logits grow by (0.1 ln F + 1)^2
               (arXiv 2309.00071)

The trained length is the model's own, or what follows a second colon, as in yarn:4:8192. Of a model whose local layers
have a rotary base of their own (Gemma 3) only the global layers change: the others look no further than their window.
"""

import argparse
import math
import sys
from dataclasses import dataclass, replace

from e5core.backbone import BackboneConfig

KINDS = ("linear", "ntk", "dynamic", "yarn")
FAST_TURNS, SLOW_TURNS = 32, 1  # YaRN's beta and alpha for Llama (arXiv 2309.00071, section 3.2)


@dataclass(frozen=True, kw_only=True, slots=True)
class LongContext:
    """What an encoder changes of its model's positions; by default nothing."""

    rope_scaling: str | None = None  # KIND:FACTOR[:TRAINED]
    rope_theta: float | None = None  # rotary base (the paper's: 1e5 for 32k, arXiv 2401.00368 figure 5)
    window: int | None = None  # keys that a query of a local layer sees; 0: all


AS_TRAINED = LongContext()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Let a command line take a LongContext."""
    parser.add_argument(
        "--rope-scaling", metavar="KIND:F[:TRAINED]", help=f"for texts up to F times as long; {', '.join(KINDS)}"
    )
    parser.add_argument("--rope-theta", type=float, metavar="BASE", help="rotary base in place of the model's")
    parser.add_argument("--window", type=int, metavar="N", help="attention window in place of the model's; 0: none")


def chosen_context(arguments: argparse.Namespace) -> LongContext:
    """Return what add_options let a command line say."""
    return LongContext(rope_scaling=arguments.rope_scaling, rope_theta=arguments.rope_theta, window=arguments.window)


def lengthened(config: BackboneConfig, context: LongContext) -> BackboneConfig:
    """Change a model's positions.

    Its max_positions becomes factor times the trained length, where that is more.
    Raises ValueError for a setting that is malformed, or that does not suit the model.
    """
    if (context.rope_scaling, context.rope_theta) != (None, None) and config.rope_divisors is not None:
        raise ValueError(
            "the model's file scales its rotary frequencies already, for the length that it says "
            f"({config.max_positions} tokens); leave out rope scaling and base"
        )
    if context.rope_theta is not None:
        if not 1 < context.rope_theta <= sys.float_info.max:
            raise ValueError(f"rope theta must be a finite number above 1: got {context.rope_theta:g}")
        config = replace(config, rope_theta=context.rope_theta)
    if context.window is not None:
        config = replace(config, window=_window(config, context.window))
    if context.rope_scaling is None:
        return config
    kind, factor, trained = _parsed(context.rope_scaling, config.max_positions)
    reach = {"max_positions": max(config.max_positions, int(factor * trained))}
    if kind == "dynamic":
        return replace(config, rope_dynamic=(factor, trained), **reach)
    if kind == "yarn":
        reach["rope_magnitude"] = 0.1 * math.log(factor) + 1
    return replace(config, rope_divisors=_divisors(kind, factor, trained, config), **reach)


def _window(config: BackboneConfig, window: int) -> int | None:
    if config.local_rope_theta is not None:
        raise ValueError("the window of a model whose local layers have a rotary base of their own cannot be changed")
    if window < 0:
        raise ValueError(f"window must be a number of keys, or 0 for all: got {window}")
    return window or None


def _parsed(text: str, max_positions: int) -> tuple[str, float, int]:
    kind, *numbers = text.split(":")
    try:
        factor, trained = float(numbers[0]), int(numbers[1]) if numbers[1:] else max_positions
    except (IndexError, ValueError):
        kind, factor, trained = "", 0.0, 0
    if kind not in KINDS or len(numbers) > 2 or not 1 < factor <= sys.float_info.max or trained < 1:
        raise ValueError(
            f"rope scaling must be KIND:FACTOR or KIND:FACTOR:TRAINED, KIND one of {', '.join(KINDS)}, FACTOR above 1, "
            f"TRAINED a number of tokens: got {text!r}"
        )
    return kind, factor, trained


def _divisors(kind: str, factor: float, trained: int, config: BackboneConfig) -> tuple[float, ...]:
    """Return what each of the d / 2 frequencies is divided by."""
    dim = config.head_dim
    if kind == "linear":
        return (factor,) * (dim // 2)
    if kind == "ntk":
        return tuple(factor ** (i / (dim - 2)) for i in range(0, dim, 2))

    def place(turns: float) -> float:
        """Return the place of the frequency that turns so often within the trained length."""
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = max(math.floor(place(FAST_TURNS)), 0), min(math.ceil(place(SLOW_TURNS)), dim - 1)
    shares = [min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0) for i in range(dim // 2)]  # 1: divided
    return tuple(1 / (share / factor + 1 - share) for share in shares)
