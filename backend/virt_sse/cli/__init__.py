"""The command line: ``virt-sse NOUN VERB``, a file per noun."""
