"""The agent: a daemon per host; serves the libvirt hook and watches the keys in use.

- :mod:`virt_sse.agent_client`: the client, for the hook; standard library only
- :mod:`virt_sse.agent.agent`: the daemon as a whole
- :mod:`virt_sse.agent.server`, :mod:`virt_sse.agent.listener`: HTTP on a Unix socket
- :mod:`virt_sse.agent.inventory`: the running domains and their disks
- :mod:`virt_sse.agent.key_watch`, :mod:`virt_sse.agent.key_status`: status of the keys of these disks
- :mod:`virt_sse.agent.revocation`, :mod:`virt_sse.agent.enforcement`: actions on domains with a revoked key
- :mod:`virt_sse.agent.secret_watch`, :mod:`virt_sse.agent.stage_watch`: libvirt secrets and stage processes
- :mod:`virt_sse.agent.plaintext_watch`, :mod:`virt_sse.agent.overlay_commit`: plaintext images
- :mod:`virt_sse.agent.automatic_rotation`: rewraps disks for new key versions
- :mod:`virt_sse.agent.metrics`, :mod:`virt_sse.agent.logs`: output for operators
"""
