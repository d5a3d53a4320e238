"""The name of two backbones, one for each stream of a retrieval task: pair:image=URI,text=URI."""

import re

from .errors import SidebenchError

SCHEME = "pair:"
STREAMS = ("image", "text")
_FORMS = (
    re.compile(r"image=(?P<image>.+?),text=(?P<text>.+)", re.DOTALL),
    re.compile(r"text=(?P<text>.+?),image=(?P<image>.+)", re.DOTALL),
)


def is_pair(uri: str) -> bool:
    """Whether a backbone's name stands for two."""
    return uri.startswith(SCHEME)


def towers_of(uri: str) -> dict[str, str]:
    """The names of the two, by stream: `image` and `text`. Raises SidebenchError for another form."""
    rest = uri.removeprefix(SCHEME)
    found = next((match for form in _FORMS if (match := form.fullmatch(rest))), None)
    if found is None or not is_pair(uri):
        raise SidebenchError(
            f"{uri} does not name two backbones; write pair:image=URI,text=URI, "
            "as in pair:image=sample:dinov2-small,text=sample:minilm-l6."
        )
    towers = {"image": found["image"], "text": found["text"]}
    if nested := next((tower for tower in towers.values() if is_pair(tower)), None):
        raise SidebenchError(f"{nested} stands inside a pair; each of its two is one backbone.")
    return towers
