"""The command line: ``virt-sse NOUN VERB``, one file per noun."""
