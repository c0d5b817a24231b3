//! Calls of what a hypervisor may do otherwise (`apply_paravirt`; kernels from
//! 6.8 on have alternatives for it).

use crate::Running;
use crate::image::Image;
use crate::instructions::{are_same, branch_to};

/// What older kernels put in place of a call of one of their own functions
/// (`arch/x86/kernel/paravirt_patch.c`).
const INLINE: [(&str, &[u8]); 17] = [
    ("_paravirt_nop", &[]),
    ("paravirt_nop", &[]),
    ("_paravirt_ident_64", &[0x48, 0x89, 0xf8]),
    ("paravirt_ident_64", &[0x48, 0x89, 0xf8]),
    ("native_save_fl", &[0x9c, 0x58]),
    ("native_restore_fl", &[0x57, 0x9d]),
    ("native_irq_disable", &[0xfa]),
    ("native_irq_enable", &[0xfb]),
    ("native_read_cr2", &[0x0f, 0x20, 0xd0]),
    ("pv_native_read_cr2", &[0x0f, 0x20, 0xd0]),
    ("native_write_cr2", &[0x0f, 0x22, 0xd7]),
    ("__native_read_cr3", &[0x0f, 0x20, 0xd8]),
    ("native_write_cr3", &[0x0f, 0x22, 0xdf]),
    ("native_wbinvd", &[0x0f, 0x09]),
    (
        "__raw_callee_save___native_queued_spin_unlock",
        &[0xc6, 0x07, 0x00],
    ),
    (
        "__raw_callee_save___native_vcpu_is_preempted",
        &[0x31, 0xc0],
    ),
    ("__raw_callee_save_pv_native_read_cr2", &[0x0f, 0x20, 0xd0]),
];

/// A call, and all that the kernel may have made of it; the first stands in
/// the image.
#[derive(Debug)]
pub(super) struct Site {
    address: u64,
    forms: Vec<Vec<u8>>,
}

/// Makes all calls direct.
pub(super) fn apply(image: &mut Image, running: &dyn Running) -> Vec<Site> {
    let Some(hooks) = running.symbol("pv_ops") else {
        return Vec::new();
    };
    let mut sites = Vec::new();
    // `struct paravirt_patch_site`: pointer, number, length.
    let records = image.record(".parainstructions").to_vec();
    for record in records.chunks(16) {
        // The last one lacks what would align the next.
        let [a, b, c, d, e, f, g, h, number, length, ..] = *record else {
            break;
        };
        let address = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        let hook = hooks.wrapping_add(u64::from(number) * 8);
        let length = usize::from(length);
        if image.get(address, length).is_none() {
            continue;
        }
        let Some(function) = running.read_u64(hook) else {
            continue;
        };
        let name = running.name_at(function);
        let inline = INLINE.iter().filter(|(known, _)| Some(*known) == name);
        let mut forms: Vec<Vec<u8>> = match (function, running.symbol("paravirt_BUG")) {
            (0, Some(bug)) => vec![branch_to(0xe8, address, bug).to_vec()],
            (0, None) => vec![vec![0x0f, 0x0b]],
            _ => vec![branch_to(0xe8, address, function).to_vec()],
        };
        forms.extend(inline.map(|(_, code)| code.to_vec()));
        if name == Some("native_iret") {
            forms.push(branch_to(0xe9, address, function).to_vec());
        }
        forms.retain_mut(|form| {
            form.resize(form.len().max(length), 0x90);
            form.len() == length
        });
        if let Some(first) = forms.first() {
            image.set(address, first);
            sites.push(Site { address, forms });
        }
    }
    sites
}

/// Takes the form that stands in memory, where no alternative took the place.
pub(super) fn choose(image: &mut Image, running: &dyn Running, sites: &[Site]) {
    for site in sites {
        let Some(first) = site.forms.first() else {
            continue;
        };
        let mut found = vec![0; first.len()];
        let untouched = image.get(site.address, first.len()) == Some(first);
        if untouched
            && running.read(site.address, &mut found)
            && site
                .forms
                .iter()
                .any(|form| are_same(site.address, form, &found))
        {
            image.set(site.address, &found);
        }
    }
}
