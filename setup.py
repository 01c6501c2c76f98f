"""Build step: generates vtpm_instance/_libtpms.py (cffi, out-of-line ABI: no compiler at run time)."""

from setuptools import setup

setup(cffi_modules=["vtpm_instance/_libtpms_build.py:ffi"])
