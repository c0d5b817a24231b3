//! Type information as a guest's memory holds it: any bytes must be read or
//! refused, and every question about what was read be answered or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use secmon_profile::Types;

fuzz_target!(|bytes: &[u8]| {
    // The first half as a kernel's types, the second as a module's on top.
    let (kernel, module) = bytes.split_at(bytes.len() / 2);
    for bytes in [bytes, kernel] {
        let Ok(types) = Types::parse(bytes.to_vec()) else {
            continue;
        };
        ask(&types);
        // What is written of them ends.
        let _ = secmon_profile::fuzzing::isf_types(&types);
        if let Ok(types) = types.parse_module(module.to_vec()) {
            ask(&types);
        }
    }
});

fn ask(types: &Types) {
    for named in types.iter().take(64) {
        let _ = types.size_of(&named.name);
        let _ = types.enumerators(&named.name);
        let members = types.members_of(named.id).unwrap_or_default();
        for member in members.iter().take(64) {
            let name = member.name.as_deref().unwrap_or("x");
            let _ = types.member(&named.name, name);
            let _ = types.member(&named.name, &format!("{name}[1].{name}"));
        }
    }
    let _ = types.any_enumerator("x");
}
