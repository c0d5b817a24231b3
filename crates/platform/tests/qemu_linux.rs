//! A live Linux guest in a QEMU without any special option: all of its RAM as
//! it is read from outside, compared with what QEMU says it holds.

use secmon_lab::{Backing, Guest, QmpAccess, Suite};
use secmon_memory::{CachedMemory, Freshness, PhysicalAddress, PhysicalMemory};
use secmon_platform::qemu::{PauseMethod, QmpUse};
use secmon_platform::target::{OpenOptions, OpenedTarget, Target};

const MEMORY_MIB: u32 = 512;
const PAGE: u64 = 4096;

/// Addresses of the pages that differ.
fn differing(memory: &dyn PhysicalMemory, truth: &[u8], chunk: usize) -> Vec<u64> {
    let mut differing = Vec::new();
    let mut bytes = vec![0; chunk];
    for (index, truth) in truth.chunks(chunk).enumerate() {
        let start = (index * chunk) as u64;
        let bytes = &mut bytes[..truth.len()];
        memory
            .read(PhysicalAddress::new(start), bytes)
            .unwrap_or_else(|error| panic!("{start:#x}: {error}"));
        if bytes == truth {
            continue;
        }
        let pages = bytes.chunks(PAGE as usize).zip(truth.chunks(PAGE as usize));
        for (page, (bytes, truth)) in pages.enumerate() {
            let address = start + page as u64 * PAGE;
            // The guest sees video memory there, RAM lies beneath.
            if bytes != truth && !(0xa_0000..0xc_0000).contains(&address) {
                differing.push(address);
            }
        }
    }
    differing
}

fn open(guest: &Guest, qmp: QmpUse) -> OpenedTarget {
    let target: Target = format!("qemu:{}", guest.name()).parse().expect("a target");
    let options = OpenOptions {
        qmp,
        ..OpenOptions::default()
    };
    target.open(&options).expect("it opens")
}

#[test]
fn all_ram_of_a_linux_guest_is_what_qemu_says() {
    let guest = Guest::builder(Suite::Bookworm)
        .memory_mib(MEMORY_MIB)
        .vcpus(2)
        .backing(Backing::Plain)
        .qmp(QmpAccess::Socket)
        .boot()
        .expect("the guest boots");
    let copy = guest.folder().join("ram-copy");
    let compared = guest.while_stopped(|qmp| {
        let size = u64::from(MEMORY_MIB) << 20;
        qmp.human(&format!("pmemsave 0 {size:#x} \"{}\"", copy.display()))?;
        let truth = std::fs::read(&copy)?;
        assert_eq!(truth.len() as u64, size);
        let used = truth
            .chunks(4096)
            .filter(|page| page.iter().any(|b| *b != 0));
        assert!(used.count() > 5000, "Linux uses its memory");

        let asked = open(&guest, QmpUse::IfAvailable);
        let unasked = open(&guest, QmpUse::Never);
        for target in [&asked, &unasked] {
            assert_eq!(target.notes, [""; 0]);
            assert!(target.memory.mapped().is_none());
            let memory = &*target.memory;
            assert_eq!(memory.size(), size);
            assert_eq!(differing(memory, &truth, 1 << 20), [0_u64; 0]);
            assert_eq!(differing(memory, &truth, 4096), [0_u64; 0]);
            // While the guest stands still a cache changes nothing.
            let cached = CachedMemory::with_freshness(
                target.memory.clone(),
                CachedMemory::DEFAULT_CAPACITY,
                Freshness::SinceClear,
            );
            for _ in 0..2 {
                assert_eq!(differing(&cached, &truth, 4096), [0_u64; 0]);
            }
            // What is not populated is zero.
            let mut populated = vec![false; truth.len() / 4096];
            for region in memory.populated() {
                let pages = region.start.as_u64() / PAGE..region.end().as_u64().div_ceil(PAGE);
                populated[pages.start as usize..pages.end as usize].fill(true);
            }
            for (page, populated) in truth.chunks(4096).zip(&populated) {
                assert!(*populated || page.iter().all(|byte| *byte == 0));
            }
        }
        assert!(matches!(asked.pause, Some(PauseMethod::Qmp(_))));
        let mut roots = Vec::new();
        for vcpu in 0..2 {
            let text = qmp.registers(vcpu)?;
            let (_, rest) = text.split_once("CR3=").expect("CR3");
            let digits: String = rest.chars().take_while(char::is_ascii_hexdigit).collect();
            let root = PhysicalAddress::new(u64::from_str_radix(&digits, 16)?);
            if !roots.contains(&root) {
                roots.push(root);
            }
        }
        assert_eq!(asked.hints.page_table_roots, roots);
        assert_eq!(unasked.hints.page_table_roots, []);
        Ok(())
    });
    compared.expect("stopped and compared");
}
