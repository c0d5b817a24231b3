"""Tables of a kernel's crash dump by drgn's own helpers, as JSON.

Usage: drgn_list.py CORE VMLINUX TABLE

TABLE is processes, arguments, modules or files.
"""

import json
import sys

import drgn
from drgn.helpers.linux.fs import d_path, for_each_file
from drgn.helpers.linux.mm import cmdline
from drgn.helpers.linux.module import for_each_module
from drgn.helpers.linux.pid import for_each_task


def text(value):
    return value.decode("utf-8", "backslashreplace")


def leaders(program):
    for task in for_each_task(program):
        if task.pid.value_() == task.tgid.value_():
            yield task


def processes(program):
    for task in leaders(program):
        yield {
            "pid": task.pid.value_(),
            "ppid": task.real_parent.tgid.value_(),
            "comm": text(task.comm.string_()),
        }


def arguments(program):
    for task in leaders(program):
        try:
            words = cmdline(task)
        except drgn.FaultError:
            # The page is not there, or swapped out.
            words = None
        yield {
            "pid": task.pid.value_(),
            "arguments": words and [text(word) for word in words],
        }


def modules(program):
    for module in for_each_module(program):
        yield {"name": text(module.name.string_())}


def files(program):
    for task in leaders(program):
        for number, file in for_each_file(task):
            yield {
                "pid": task.pid.value_(),
                "fd": number,
                "path": text(d_path(file.f_path)),
            }


def main():
    core, vmlinux, table = sys.argv[1:]
    program = drgn.Program()
    program.set_core_dump(core)
    program.load_debug_info([vmlinux])
    tables = {
        "processes": processes,
        "arguments": arguments,
        "modules": modules,
        "files": files,
    }
    json.dump(list(tables[table](program)), sys.stdout)


main()
