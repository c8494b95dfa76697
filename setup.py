"""Build script: pip install -e . installs the package `equimini`."""

from setuptools import setup

setup(
    name="equimini",
    version="0.1.0",
    description="A minimal reference implementation of Equivariant Image Modeling",
    license="MIT",
    packages=["equimini"],
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy", "pillow>=10.1", "scipy", "tqdm"],
    extras_require={"test": ["pytest"]},
)
