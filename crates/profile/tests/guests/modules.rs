//! Symbols and types of loaded modules, found by the kernel's own lists.

use secmon_lab::Guest;
use secmon_memory::VirtualAddress;
use secmon_profile::{Kernel, ModuleSymbolTable, module_symbols, module_types};

/// The addresses of the structures in a kernel's list.
fn list(kernel: &Kernel, head: &str, structure: &str) -> Vec<VirtualAddress> {
    let types = kernel.profile.types().expect("types");
    let link = types.member(structure, "list").expect("its link").offset;
    let head = kernel.profile.symbols().address(head).expect("the list");
    let mut found = Vec::new();
    let mut next = kernel.space.read_pointer(head).expect("the first");
    while next != head {
        found.push(next.wrapping_sub(link));
        assert!(found.len() < 1000, "a list without end");
        next = kernel.space.read_pointer(next).expect("the next");
    }
    found
}

fn name(kernel: &Kernel, module: VirtualAddress) -> String {
    let types = kernel.profile.types().expect("types");
    let member = types.member("module", "name").expect("its name");
    let address = module.wrapping_add(member.offset);
    let bytes = kernel.space.read_c_string(address, member.size as usize);
    String::from_utf8(bytes.expect("its name")).expect("a name")
}

/// Compares symbols with `/proc/kallsyms`, types with `/sys/kernel/btf`.
pub fn compare(guest: &Guest, kernel: &Kernel) {
    let types = kernel.profile.types().expect("types");
    let offset = |structure: &str, path: &str| types.member(structure, path).expect(path).offset;
    let all = guest.truth().kallsyms().expect("the guest's truth");
    let modules = list(kernel, "modules", "module");
    assert!(!modules.is_empty(), "the guest loads modules");
    for module in modules {
        let name = name(kernel, module);
        let place = module.wrapping_add(offset("module", "kallsyms"));
        let table = kernel.space.read_pointer(place).expect("a pointer");
        let pointer = |path: &str| {
            let place = table.wrapping_add(offset("mod_kallsyms", path));
            kernel.space.read_pointer(place).expect("a pointer")
        };
        let count = table.wrapping_add(offset("mod_kallsyms", "num_symtab"));
        let table = ModuleSymbolTable {
            symbols: pointer("symtab"),
            count: kernel.space.read_u32(count).expect("a number").into(),
            names: pointer("strtab"),
            kinds: Some(pointer("typetab")),
        };
        let found = module_symbols(&kernel.space, &table).expect("symbols");
        let found: Vec<(u64, char, &str)> = found
            .iter()
            // An exported symbol is upper case there.
            .map(|symbol| {
                (
                    symbol.address.as_u64(),
                    symbol.kind.to_ascii_lowercase(),
                    symbol.name,
                )
            })
            .collect();
        let own: Vec<(u64, char, &str)> = all
            .iter()
            .filter(|symbol| symbol.module.as_deref() == Some(&name))
            .map(|symbol| {
                (
                    symbol.address,
                    symbol.kind.to_ascii_lowercase(),
                    symbol.name.as_str(),
                )
            })
            .collect();
        assert_eq!(found, own, "{name}");
    }
    // Modules have types of their own from 5.11 on.
    if !types.has_type("btf_module") {
        return;
    }
    let with_types = list(kernel, "btf_modules", "btf_module");
    assert!(!with_types.is_empty(), "the guest's modules have types");
    for entry in with_types {
        let pointer = |address: VirtualAddress, structure: &str, path: &str| {
            let place = address.wrapping_add(offset(structure, path));
            kernel.space.read_pointer(place).expect("a pointer")
        };
        let name = name(kernel, pointer(entry, "btf_module", "module"));
        let btf = pointer(entry, "btf_module", "btf");
        let size = btf.wrapping_add(offset("btf", "data_size"));
        let size = kernel.space.read_u32(size).expect("a number");
        let data = pointer(btf, "btf", "data");
        let found = module_types(&kernel.space, data, size.into(), types).expect(&name);
        assert!(found.len() > types.len(), "{name}");
        for named in found.iter().skip(types.iter().count()) {
            found.members_of(named.id).expect("members that make sense");
        }
        let path = format!("/sys/kernel/btf/{name}");
        let own = guest.truth().read_file(&path).expect(&path);
        assert_eq!(found.bytes(), own.0, "{name}");
    }
}
