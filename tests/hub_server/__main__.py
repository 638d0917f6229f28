"""`python -m tests.hub_server FOLDER [--port 8000]`: a Hub to look at by hand. Stop it with Ctrl-C."""

import argparse
import threading
from pathlib import Path

from . import HubServer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--port", type=int, default=0)
options = parser.parse_args()
with HubServer(options.folder, users={"alice": "write"}, port=options.port) as hub:
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token('alice')} HF_HUB_DISABLE_XET=1", flush=True)
    threading.Event().wait()
