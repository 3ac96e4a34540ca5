"""The data owner's side of POST. Only this package reads private data.

from post_client import Client

client = Client(url="https://provider.example", api_key="post_...")
job = client.transfers.create(prompt=prompt.id, target="smollm2", dataset="amazon")
job.wait()
"""

from __future__ import annotations

from post_client.client import AsyncClient, Client
from post_client.outbound import OutboundRequest, build_upload

__all__ = ["AsyncClient", "Client", "OutboundRequest", "build_upload"]
