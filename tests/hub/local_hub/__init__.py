"""A Hugging Face Hub on this machine, for tests that run the real client: git repositories, LFS, tokens, faults on demand.

with LocalHub() as hub:
    hub.add_user("ann", token="hf_ann")
    hub.commit("ann/model", {"config.json": b"{}", "model.safetensors": weights})
    subprocess.run([...], env=hub.environment(home, token="hf_ann"))
    hub.requests  # what the client asked for
"""

from .faults import Fault as Fault
from .faults import Request as Request
from .server import LocalHub as LocalHub

__all__ = ["Fault", "LocalHub", "Request"]
