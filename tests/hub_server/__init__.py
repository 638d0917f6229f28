"""A small, strict Hub on loopback, for the unmodified client of `huggingface_hub`.

    with HubServer(folder, users={"alice": "write"}) as hub:
        HfApi(endpoint=hub.url, token=hub.token("alice")).create_repo("alice/model")

Or, for a look by hand: `python -m tests.hub_server FOLDER`. Every repository is a bare git repository whose commits
are made by git itself; contents of large files are kept once, under their sha256, which is verified. What the client
may not do is refused as the real Hub refuses it, and `faults` break in where a test asks for it.

Not there: xet (asked for a xet token it answers 404, as a Hub without xet; set HF_HUB_DISABLE_XET=1), datasets,
spaces, discussions besides the pull requests that commits open.
"""

from .faults import Fault
from .server import HubServer

__all__ = ["Fault", "HubServer"]
