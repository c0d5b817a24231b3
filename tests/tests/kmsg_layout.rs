//! The kernel's log can be read without the kernel's types: VMCOREINFO and the
//! log's own data lead to the same layout as the types do.

use anyhow::{Context, Result, ensure};
use secmon_guest::linux::kmsg::layout::{
    ring_by_proof, ring_from_core_information, ring_from_types,
};
use secmon_guest::linux::kmsg::ring::{Found, RingLayout, records};
use secmon_lab::Suite;
use secmon_memory::VirtualAddress;
use secmon_tests::images;

fn same_by_all_ways(suite: Suite) -> Result<()> {
    let opened = images::quiet(suite)?;
    let kernel = &opened.kernel;
    let types = ring_from_types(kernel.profile.types()?)?;
    let notes = kernel.vmcoreinfo.as_ref().context("VMCOREINFO")?;
    let notes = ring_from_core_information(notes.text.as_bytes()).context("its offsets")?;
    // VMCOREINFO says nothing of the thread's name.
    ensure!(
        notes
            == RingLayout {
                command: None,
                ..types
            },
        "{notes:?}\n{types:?}"
    );

    let prb = kernel.profile.symbols().address("prb").context("prb")?;
    let ring = kernel.space.read_pointer(prb)?;
    let read = |address: VirtualAddress, buffer: &mut [u8]| kernel.space.read(address, buffer);
    let proved = ring_by_proof(ring, &read).context("no known layout fits")?;
    ensure!(proved == types, "{proved:?}\n{types:?}");

    let mut first = None;
    records(&proved, ring, &read, &mut |found| {
        if let Found::Record(record) = found {
            first.get_or_insert(record);
        }
        true
    })?;
    let first = first.context("no record")?;
    ensure!(first.text.starts_with(b"Linux version "), "{first:?}");
    Ok(())
}

#[test]
fn linux_5_10() -> Result<()> {
    same_by_all_ways(Suite::Bullseye)
}

#[test]
fn linux_7_2() -> Result<()> {
    same_by_all_ways(Suite::Sid)
}
