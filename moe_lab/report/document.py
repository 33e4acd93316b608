"""Every page as a document: a template filled with escaped text, our style, and scripts.

All text on a page is untrusted: ``plain_text.on_page`` makes it visible and bounds it, and the
template escapes it; JSON inside ``<script>`` is escaped here. A content security policy with the
hashes of the page's own three scripts keeps any other script from running and any request from
leaving.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from moe_lab.plain_text import on_page
from moe_lab.report import theme

JSON_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def document(
    template: str,
    scripts: Sequence[str],
    *,
    package: str = "moe_lab.report",
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:
    """The page of ``template`` with ``values``, our style and the scripts ``early.js``, plotly.js
    and ``scripts``, joined.

    Args:
        template, scripts: files in the folder ``templates`` of ``package`` or of this one.
        filters: of the template, beside ``script_json``.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    loader = ChoiceLoader([PackageLoader(package), PackageLoader("moe_lab.report")])
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"script_json": script_json, **(filters or {})}
    variables = "".join(f"--{name}:{value};" for name, value in theme.css_variables().items())

    def text_of(name: str) -> str:
        return loader.get_source(environment, name)[0]

    texts = {
        "early": text_of("early.js"),
        "page": "".join(map(text_of, scripts)),
        "plotly": get_plotlyjs(),
    }
    # A closing tag inside a script would end it early; today's plotly.js has none, a later one may.
    texts = {name: text.replace("</script", "<\\/script") for name, text in texts.items()}
    return environment.get_template(template).render(
        variables=Markup(variables),
        style=Markup(text_of("page.css")),
        scripts={name: Markup(text) for name, text in texts.items()},
        script_hashes=Markup(" ".join(f"'sha256-{_sha256(text)}'" for text in texts.values())),
        themes={name: theme.template_values(name) for name in theme.PALETTES},
        **values,
    )


def script_json(value: Any) -> Markup:
    """JSON for a ``<script type="application/json">``: nothing in it can close the element or start
    a comment. Arrays are lists, and what is no finite number is null.
    """
    text = json.dumps(
        shown(value), default=_plain, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    for character, escaped in JSON_ESCAPES.items():
        text = text.replace(character, escaped)
    return Markup(text)


def shown(value: Any) -> Any:
    """``value`` with every text in it as a page shows it; markup of our own stays."""
    if isinstance(value, str):
        return value if isinstance(value, Markup) else on_page(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {shown(key): shown(entry) for key, entry in value.items()}
    return [shown(entry) for entry in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """An array or a number of numpy's as JSON has it."""
    return shown(value.tolist())


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
