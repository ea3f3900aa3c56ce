"""What a TPU machine of Compute Engine says of itself."""

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# The server of metadata, by number: names are not asked for where there is no such server.
SERVER = "169.254.169.254"
SECONDS = 3
VENDOR = "0x1ae0"


def tpu_metadata(pci: Path = Path("/sys/bus/pci/devices")) -> Callable[[str], str | None] | None:
    """Return the function that asks the machine for an attribute; None without a TPU and libtpu.

    Args:
        pci: folder of the devices of this machine.
    """
    if find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        return None
    return ask if any(map(_is_google, pci.glob("*/vendor"))) else None


def ask(attribute: str) -> str | None:
    """Return an attribute of this machine; None, with a note, if no server answers.

    The server is a part of each machine and answers in milliseconds, so it gets few seconds.
    """
    server = os.environ.get("GCE_METADATA_IP") or SERVER
    address = f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}"
    request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
    # A proxy would not reach it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    why: object = ""
    for _ in range(2):
        try:
            with opener.open(request, timeout=SECONDS) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            why = error.code
        except OSError as error:
            why = getattr(error, "reason", error)
    print(
        f"note: this TPU's metadata do not answer ({why}), so the process trains alone; on a slice "
        "of several hosts use --coordinator HOST:PORT --num-processes N --process-id I",
        file=sys.stderr,
    )
    return None


def _is_google(vendor: Path) -> bool:
    try:
        return vendor.read_text().strip() == VENDOR
    except OSError:
        return False
