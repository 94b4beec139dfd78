"""The one place where the client's version stands."""

VERSION = "0.1.0"
