"""Settle what becomes of each call: in a converted model only the converted sites. The graph stays as it is.

before                                     after
tagged call: salad                         salad, unless the options contradict what the site carries (an error)
tagged call: dense (it became causal)      dense, and lost: named in the error of a strict compilation
call without a tag: block-sparse           dense in a converted model, block-sparse in any other
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from torch import fx

from salad_compile.config import BackendOptions, SaladConfig
from salad_compile.definition.spec import AttentionSpec
from salad_compile.errors import ConfigError
from salad_compile.passes.attention_call import CONVERTED, LEFT_DENSE, AttentionCall
from salad_compile.passes.context import Context, Counts, Pass

_NOT_CONVERTED = "not a converted site of this converted model"


def _run(graph: fx.Graph, context: Context) -> Counts:
    calls = context.calls[graph] = [_settle(call, context) for call in context.calls[graph]]
    context.lost += [f"{call.module or 'the compiled module'}: {call.reason}" for call in calls if call.is_lost]
    return Counter(call.status for call in calls)


PASS = Pass("settle_calls", _run)


def _settle(call: AttentionCall, context: Context) -> AttentionCall:
    if call.status == CONVERTED:
        _check_options(call.spec, context.options)
        return call
    if context.converted and call.status != LEFT_DENSE:
        return dataclasses.replace(call, status=LEFT_DENSE, reason=_NOT_CONVERTED)
    return call


def _check_options(spec: AttentionSpec, options: BackendOptions) -> None:
    """Raises ConfigError if the options name another value than the conversion for what a site computes."""
    asked = options.spec
    fields = {"sparsity": "permille", "pattern": "pattern", "query_block": "query_block", "key_block": "key_block"}
    for name, field in fields.items():
        if name in options.given and getattr(asked, field) != getattr(spec, field):
            raise ConfigError(
                f"options say {name}={getattr(options, name)!r}, but the model was converted with another value, and "
                f"uncompiled it would compute that one. Leave {name} out of options, or convert with "
                f"{SaladConfig.__name__}({name}={getattr(options, name)!r})."
            )
