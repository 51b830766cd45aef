"""Places that are no directories of this machine: object stores, the hub, web servers.

urls.py      how a recipe names them
objects.py   what is read: its name, its size, and which version of it
stores.py    the seam: list what there is, read a range of it
s3.py, hub.py, web.py   behind the seam
retrying.py  what is tried again, and how often
copies.py    what lies on this machine of it: small files whole, of large ones the headers
"""
