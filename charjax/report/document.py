"""One self-contained HTML document: a template filled, its style and script inside, and nothing else let in."""

import base64
import hashlib
from typing import Any

import jinja2
from etils import epath
from markupsafe import Markup

_HERE = epath.Path(__file__).parent


def fill(template: str, script: str = '', **values: Any) -> str:
  """The document of a template in this folder; `script` names a file beside it. Every value is escaped."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(str(_HERE)),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  style, code = (_HERE / 'page.css').read_text(), (_HERE / script).read_text() if script else ''
  scripts = f"script-src '{_sha256(code)}'; " if code else ''
  return environment.get_template(template).render(
    policy=f"default-src 'none'; style-src '{_sha256(style)}'; {scripts}base-uri 'none'; form-action 'none'",
    style=Markup(style),
    script=Markup(code),
    **values,
  )


def _sha256(text: str) -> str:
  return 'sha256-' + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
