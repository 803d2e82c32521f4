"""The page: a read-only web page about a host, for people.

- :mod:`virt_sse.agent.page_service`: listens, starts the process below, answers its requests
- :mod:`virt_sse.page.overview`, :mod:`virt_sse.page.survey`: in the agent; collect what the page shows
- :mod:`virt_sse.page.document`: what the page shows, as sent to the process; no key material
- :mod:`virt_sse.page.process`: the confined process, which speaks HTTP
- :mod:`virt_sse.page.application`, :mod:`virt_sse.page.views`, :mod:`virt_sse.page.alerts`,
  :mod:`virt_sse.page.picture`: HTTP, and the content of the pages
- :mod:`virt_sse.page.access`: token, links and cookies
"""
