"""A process with hf_sp's modules but not its `__init__`, which brings all of transformers."""

BARE = """
import sys, types
package = types.ModuleType("hf_sp")
package.__path__ = ["hf_sp"]
sys.modules["hf_sp"] = package
"""
