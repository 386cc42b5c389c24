"""Keys, signatures, published measurements and the bill of materials of an image.

keys.py       where the keys are, and test keys for development
pe.py         reading PE files: sections, Authenticode hashes
esp.py        the EFI system partition inside a disk image
tools.py      the programs that sign, with a key in a file or behind PKCS#11
variables.py  Secure Boot's variables: enrolment files, and what PCR 7 gets of them
measure.py    what a machine that boots the image will measure
sign.py       unsigned artefacts -> signed ones
"""
