"""Find what was said in recordings, in any language, without transcribing them: the engine.

Usable from a notebook, without the service around it: `clasp_core.library.Library` keeps recordings
and searches them, `clasp_core.models` holds the encoders, `clasp_core.evaluation` measures them.
"""
