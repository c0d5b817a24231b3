//! Writes a kernel's symbols and types as an ISF document, so that tools that
//! need such a file for every kernel build, volatility3 first of all, work on
//! a guest whose debug package nobody has.
//!
//! Symbols stand at the addresses that they were linked for: one file serves
//! every boot of a kernel. Of a kernel's variables its own types tell those of
//! the per-CPU sections only; [`VARIABLES`] tells the ones that forensic tools
//! start from.
//!
//! Source of the format: volatility3's `schemas/schema-6.2.0.json`.

use std::collections::HashSet;
use std::io::{self, BufWriter, Write};

use secmon_memory::VirtualAddress;

use crate::tables::START_KERNEL_MAP;
use crate::types::export::{Export, Items};
use crate::{Kernel, ProfileError, SymbolRef, Symbols, Types};

/// Why no ISF document can be written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The kernel's types are not known.
    #[error(transparent)]
    Types(#[from] ProfileError),
    /// The document can't be written.
    #[error("writing the ISF document: {0}")]
    Write(#[from] io::Error),
}

/// Variables of the kernel and their types as its sources declare them. One
/// whose type the kernel lacks is left without.
const VARIABLES: [(&str, Declared); 42] = [
    ("bpf_kallsyms", Declared::Structure("list_head")),
    ("cap_last_cap", Declared::Base("int")),
    ("ftrace_list_end", Declared::Structure("ftrace_ops")),
    ("ftrace_mod_maps", Declared::Structure("list_head")),
    ("ftrace_ops_list", Declared::Pointer("ftrace_ops")),
    ("idt_table", Declared::Array("gate_struct", 256)),
    ("init_cred", Declared::Structure("cred")),
    ("init_files", Declared::Structure("files_struct")),
    ("init_fs", Declared::Structure("fs_struct")),
    ("init_mm", Declared::Structure("mm_struct")),
    ("init_net", Declared::Structure("net")),
    ("init_nsproxy", Declared::Structure("nsproxy")),
    ("init_pid_ns", Declared::Structure("pid_namespace")),
    ("init_task", Declared::Structure("task_struct")),
    ("init_user_ns", Declared::Structure("user_namespace")),
    ("init_uts_ns", Declared::Structure("uts_namespace")),
    ("iomem_resource", Declared::Structure("resource")),
    ("ioport_resource", Declared::Structure("resource")),
    (
        "keyboard_notifier_list",
        Declared::Structure("atomic_notifier_head"),
    ),
    ("link_idr", Declared::Structure("idr")),
    ("map_idr", Declared::Structure("idr")),
    ("mod_tree", Declared::Structure("mod_tree_root")),
    ("module_kset", Declared::Pointer("kset")),
    ("modules", Declared::Structure("list_head")),
    ("net_namespace_list", Declared::Structure("list_head")),
    ("num_registered_fb", Declared::Base("int")),
    ("page_offset_base", Declared::Base("long unsigned int")),
    ("phys_base", Declared::Base("long unsigned int")),
    ("prb", Declared::Pointer("printk_ringbuffer")),
    ("prog_idr", Declared::Structure("idr")),
    ("raw_v4_hashinfo", Declared::Structure("raw_hashinfo")),
    ("socket_file_ops", Declared::Structure("file_operations")),
    (
        "sockfs_dentry_operations",
        Declared::Structure("dentry_operations"),
    ),
    ("super_blocks", Declared::Structure("list_head")),
    ("taint_flags", Declared::Rest("taint_flag")),
    ("tcp4_seq_afinfo", Declared::Structure("tcp_seq_afinfo")),
    ("tcp6_seq_afinfo", Declared::Structure("tcp_seq_afinfo")),
    ("tcp_hashinfo", Declared::Structure("inet_hashinfo")),
    ("tk_core", Declared::Nameless(&["seq", "timekeeper"])),
    ("tty_drivers", Declared::Structure("list_head")),
    ("vmalloc_base", Declared::Base("long unsigned int")),
    ("vmemmap_base", Declared::Base("long unsigned int")),
];

/// A type as a variable is declared with it.
#[derive(Clone, Copy)]
enum Declared {
    Base(&'static str),
    Structure(&'static str),
    Pointer(&'static str),
    Array(&'static str, u32),
    /// As many of a structure as fit before the next symbol.
    Rest(&'static str),
    /// Of a structure that has no name, with these members.
    Nameless(&'static [&'static str]),
}

/// Writes the kernel's symbols and types as an ISF document (JSON, format
/// 6.2.0).
///
/// # Errors
/// [`ExportError`] if the kernel's types are not known or `out` fails.
pub fn write_isf(kernel: &Kernel, out: impl Write) -> Result<(), ExportError> {
    let profile = &kernel.profile;
    let types = profile.types()?;
    let document = Document {
        types,
        symbols: profile.symbols(),
        banner: profile.banner(),
        slide: kernel.image.slide,
    };
    let mut out = BufWriter::new(out);
    document.write(&mut out)?;
    out.flush()?;
    Ok(())
}

/// What one document is made of.
struct Document<'a> {
    types: &'a Types,
    symbols: &'a Symbols,
    banner: &'a str,
    slide: u64,
}

impl Document<'_> {
    fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let version = env!("CARGO_PKG_VERSION");
        write!(
            out,
            "{{\"metadata\":{{\"format\":\"6.2.0\",\"producer\":{{\"name\":\"secmon\",\
             \"version\":\"{version}\"}},\"linux\":{{}}}},"
        )?;
        let export = Export::new(self.types);
        export.write_sections(out)?;
        out.write_all(b",\"symbols\":{")?;
        self.write_symbols(&export, out)?;
        out.write_all(b"}}\n")
    }

    fn write_symbols(&self, export: &Export<'_>, out: &mut impl Write) -> io::Result<()> {
        let mut items = Items::new(out);
        let mut written = HashSet::new();
        for symbol in self.symbols.iter() {
            if !written.insert(symbol.name) {
                continue;
            }
            // What lies in the image moves with it, per-CPU offsets don't.
            let address = match symbol.address.as_u64() {
                address @ START_KERNEL_MAP.. => address.wrapping_sub(self.slide),
                address => address,
            };
            let out = items.key(symbol.name)?;
            write!(out, "{{\"address\":{address},\"type\":")?;
            self.write_type(export, symbol, out)?;
            if symbol.name == "linux_banner" {
                // As it lies in memory.
                let text = encode_base64(format!("{}\n\0", self.banner).as_bytes());
                write!(out, ",\"constant_data\":\"{text}\"")?;
            }
            out.write_all(b"}")?;
        }
        Ok(())
    }

    /// The type of a symbol, `void` where nothing tells it.
    fn write_type(
        &self,
        export: &Export<'_>,
        symbol: SymbolRef<'_>,
        out: &mut impl Write,
    ) -> io::Result<()> {
        let declared = VARIABLES
            .binary_search_by_key(&symbol.name, |(name, _)| name)
            .ok()
            .and_then(|position| VARIABLES.get(position))
            .map(|(_, declared)| *declared);
        let mut array = |count: u64, id| {
            write!(out, "{{\"kind\":\"array\",\"count\":{count},\"subtype\":")?;
            export.write_reference(id, out)?;
            out.write_all(b"}")
        };
        match declared {
            Some(Declared::Array(name, count)) if let Some(id) = export.composite(name) => {
                return array(count.into(), id);
            }
            Some(Declared::Rest(name)) if let Some(id) = export.composite(name) => {
                let size = self.types.size_of(name).unwrap_or(0);
                let count = self.room(symbol.address).checked_div(size).unwrap_or(0);
                return array(count, id);
            }
            _ => {}
        }
        match declared {
            Some(Declared::Base(name)) => {
                write!(out, "{{\"kind\":\"base\",\"name\":\"{name}\"}}")
            }
            Some(Declared::Structure(name)) if let Some(id) = export.composite(name) => {
                export.write_reference(id, out)
            }
            Some(Declared::Nameless(members)) if let Some(id) = export.nameless_with(members) => {
                export.write_reference(id, out)
            }
            Some(Declared::Pointer(name)) if let Some(id) = export.composite(name) => {
                out.write_all(b"{\"kind\":\"pointer\",\"subtype\":")?;
                export.write_reference(id, out)?;
                out.write_all(b"}")
            }
            _ => match export.variable(symbol.name) {
                Some(id) => export.write_reference(id, out),
                None => out.write_all(b"{\"kind\":\"base\",\"name\":\"void\"}"),
            },
        }
    }

    /// The bytes from `address` to the next symbol, at most a page.
    fn room(&self, address: VirtualAddress) -> u64 {
        let start = address.as_u64();
        self.symbols
            .iter()
            .filter_map(|symbol| symbol.address.as_u64().checked_sub(start))
            .filter(|distance| *distance > 0)
            .min()
            .map_or(0, |distance| distance.min(secmon_memory::PAGE_SIZE))
    }
}

/// Base64 with padding (RFC 4648).
fn encode_base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let byte = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) as usize & 63;
            match digit <= group.len() {
                true => text.push(char::from(ALPHABET[value])),
                false => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::Isf;
    use crate::types::Kind;
    use crate::types::encode::{Encoder, NewMember};

    const TEXT: u64 = 0xffff_ffff_8100_0000;
    const SLIDE: u64 = 0x1c00_0000;

    fn member(name: &str, type_id: u32, bit_offset: u32, bit_size: u8) -> NewMember {
        NewMember {
            name: name.to_owned(),
            type_id,
            bit_offset,
            bit_size,
        }
    }

    /// A few types of every kind that a reference can go through.
    fn sample_blob() -> Vec<u8> {
        let mut encoder = Encoder::new();
        let int = encoder.integer("int", 4, true);
        let unsigned = encoder.integer("unsigned int", 4, false);
        let character = encoder.integer("char", 1, true);
        let name = encoder.array(character, 16);
        let task = int + 12;
        let next = encoder.reference(Kind::Pointer, "", task);
        let constant = encoder.reference(Kind::Const, "", next);
        let prototype = encoder.reference(Kind::FunctionPrototype, "", 0);
        let call = encoder.reference(Kind::Pointer, "", prototype);
        let inside = encoder.structure(Kind::Union, "", 4, &[member("pid", int, 0, 0)]);
        let nameless = encoder.structure(Kind::Structure, "", 4, &[member("counter", int, 0, 0)]);
        let counter = encoder.reference(Kind::Typedef, "atomic_t", nameless);
        let state = encoder.enumeration("state", 4, &[("DEAD".into(), -1), ("READY".into(), 7)]);
        let made = encoder.structure(
            Kind::Structure,
            "task_struct",
            64,
            &[
                member("comm", name, 0, 0),
                member("next", constant, 128, 0),
                member("call", call, 192, 0),
                member("", inside, 256, 0),
                member("usage", counter, 288, 0),
                member("flag", unsigned, 323, 2),
                member("state", state, 352, 0),
            ],
        );
        assert_eq!(made, task, "the pointer above points to it");
        encoder.structure(Kind::Structure, "taint_flag", 16, &[]);
        encoder.finish()
    }

    fn export(blob: Vec<u8>) -> Vec<u8> {
        let symbols = [
            ("cpu_number", 0x1000, 'A'),
            ("_text", TEXT + SLIDE, 'T'),
            ("init_task", TEXT + SLIDE + 0x1000, 'D'),
            ("linux_banner", TEXT + SLIDE + 0x2000, 'D'),
            ("taint_flags", TEXT + SLIDE + 0x2100, 'D'),
            ("after", TEXT + SLIDE + 0x2138, 'D'),
            ("_text", TEXT + SLIDE + 0x3000, 't'),
        ]
        .map(|(name, address, kind)| (name.to_owned(), address, kind));
        let mut text = Vec::new();
        Document {
            types: &Types::parse(blob).expect("a good blob"),
            symbols: &Symbols::from_list(&symbols).expect("a short list"),
            banner: "Linux version 9.9.9",
            slide: SLIDE,
        }
        .write(&mut text)
        .expect("writing to memory");
        text
    }

    #[test]
    fn what_is_written_reads_the_same() {
        let isf = Isf::parse(Path::new("own"), &export(sample_blob())).expect("a good file");
        assert_eq!(isf.banner(), Some("Linux version 9.9.9"));
        let before = Types::parse(sample_blob()).expect("a good blob");
        for path in [
            "comm",
            "comm[3]",
            "call",
            "pid",
            "usage.counter",
            "flag",
            "state",
        ] {
            let [old, new] = [&before, isf.types()].map(|types| types.member("task_struct", path));
            let (old, new) = (old.expect(path), new.expect(path));
            let place = |member: &crate::Member| {
                (
                    member.offset,
                    member.size,
                    member.bit_offset,
                    member.bit_size,
                    member.count,
                    member.pointer,
                )
            };
            assert_eq!(place(&old), place(&new), "{path}");
        }
        let next = isf.types().member("task_struct", "next").expect("next");
        assert_eq!(next.type_name, "struct task_struct *");
        assert_eq!(isf.types().size_of("task_struct"), Ok(64));
        assert_eq!(isf.types().enumerator("state", "DEAD"), Ok(-1));
        assert!(isf.types().has("atomic_t", "counter"));
    }

    #[test]
    fn symbols_stand_where_they_were_linked() {
        let json: serde_json::Value = serde_json::from_slice(&export(sample_blob())).expect("JSON");
        let address = |name: &str| json["symbols"][name]["address"].as_u64();
        assert_eq!(address("_text"), Some(TEXT));
        assert_eq!(address("cpu_number"), Some(0x1000));
        let task = &json["symbols"]["init_task"]["type"];
        assert_eq!(task["kind"], "struct");
        assert_eq!(task["name"], "task_struct");
        assert_eq!(json["symbols"]["taint_flags"]["type"]["count"], 3);
        assert_eq!(json["metadata"]["format"], "6.2.0");
    }

    #[test]
    fn variables_are_in_order() {
        assert!(VARIABLES.is_sorted_by_key(|(name, _)| *name));
    }

    #[test]
    fn references_that_never_end_are_cut() {
        let mut encoder = Encoder::new();
        let itself = encoder.reference(Kind::Pointer, "", 1);
        encoder.structure(Kind::Structure, "knot", 8, &[member("end", itself, 0, 0)]);
        let text = export(encoder.finish());
        let isf = Isf::parse(Path::new("knot"), &text).expect("a good file");
        assert!(isf.types().member("knot", "end").expect("end").pointer);
    }

    #[test]
    fn base64() {
        for (bytes, text) in [("Man", "TWFu"), ("Ma", "TWE="), ("M", "TQ=="), ("", "")] {
            assert_eq!(encode_base64(bytes.as_bytes()), text);
        }
    }

    proptest! {
        /// Forged types make a document that can be read, or none.
        #[test]
        fn changed_types_are_written_as_json(
            changes in proptest::collection::vec((24_usize..400, any::<u8>()), 1..8),
        ) {
            let mut blob = sample_blob();
            for (position, byte) in changes {
                let length = blob.len();
                blob[position % length] = byte;
            }
            if Types::parse(blob.clone()).is_ok() {
                let text = export(blob);
                let json: Result<serde_json::Value, _> = serde_json::from_slice(&text);
                prop_assert!(json.is_ok());
            }
        }
    }
}
