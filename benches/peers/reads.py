"""Virtual reads by the peers that are Python libraries.

Usage: reads.py PEER IMAGE ROOT ADDRESSES MODE

PEER is drgn (IMAGE is an ELF core with VMCOREINFO) or volatility3 (IMAGE is
raw, ROOT the physical address of the page tables). ADDRESSES holds virtual
addresses, 8 bytes each, little endian. MODE is `single` (8 bytes from each) or
`pages` (4096 bytes from each).

Prints one JSON object: nanoseconds for each read, the sum of the values read
(of a page: of its first 8 bytes), and how many reads failed.
"""

import array
import json
import pathlib
import sys
import time


def drgn_reader(image, _root):
    import drgn

    program = drgn.Program()
    program.set_core_dump(image)
    return program.read, drgn.FaultError


def volatility3_reader(image, root):
    from volatility3.framework import contexts, exceptions
    from volatility3.framework.layers import intel, physical

    context = contexts.Context()
    context.config["file.location"] = pathlib.Path(image).absolute().as_uri()
    context.add_layer(physical.FileLayer(context, "file", "file"))
    context.config["kernel.memory_layer"] = "file"
    context.config["kernel.page_map_offset"] = int(root, 16)
    layer = intel.LinuxIntel32e(context, "kernel", "kernel")
    context.add_layer(layer)
    return layer.read, exceptions.InvalidAddressException


def main():
    peer, image, root, addresses, mode = sys.argv[1:]
    readers = {"drgn": drgn_reader, "volatility3": volatility3_reader}
    read, fault = readers[peer](image, root)
    wanted = array.array("Q")
    wanted.frombytes(pathlib.Path(addresses).read_bytes())
    wanted = wanted.tolist()
    size = {"single": 8, "pages": 4096}[mode]
    from_bytes = int.from_bytes
    total = failed = 0
    start = time.perf_counter_ns()
    for address in wanted:
        try:
            data = read(address, size)
        except fault:
            failed += 1
            continue
        total += from_bytes(data[:8], "little")
    elapsed = time.perf_counter_ns() - start
    result = {
        "nanoseconds": elapsed / max(len(wanted), 1),
        "sum": total & 0xFFFF_FFFF_FFFF_FFFF,
        "failed": failed,
    }
    json.dump(result, sys.stdout)


main()
