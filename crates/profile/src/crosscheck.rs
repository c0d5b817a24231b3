//! Compares what a kernel says about itself with what was found without it.

use secmon_memory::PagingMode;

use crate::tables::START_KERNEL_MAP;
use crate::{KernelImage, Profile, VmcoreInfo};

/// The banner without its build's number: "… #1 SMP …" becomes "… # SMP …".
pub(crate) fn without_number(banner: &str) -> String {
    match banner.rsplit_once(" #") {
        Some((before, after)) => {
            let after = after.trim_start_matches(|c: char| c.is_ascii_digit());
            format!("{before} #{after}")
        }
        None => banner.to_owned(),
    }
}

/// What VMCOREINFO says otherwise than page tables and symbols: the key, its
/// value, and what was found.
pub(crate) fn differences(
    info: &VmcoreInfo,
    image: &KernelImage,
    mode: PagingMode,
    profile: &Profile,
) -> Vec<(&'static str, String, String)> {
    let KernelImage {
        virtual_base,
        physical_base,
        slide,
        ..
    } = *image;
    let mut all = Vec::new();
    if let Some(said) = info.kernel_offset
        && said != slide
    {
        all.push((
            "KERNELOFFSET",
            format!("{said:x}"),
            format!("a slide of {slide:#x}"),
        ));
    }
    let base =
        physical_base.as_u64() as i64 - virtual_base.as_u64().wrapping_sub(START_KERNEL_MAP) as i64;
    if let Some(said) = info.physical_base
        && said != base
    {
        let found = format!("the image at physical {physical_base}");
        all.push(("NUMBER(phys_base)", said.to_string(), found));
    }
    let symbol = |names: &[&str]| names.iter().find_map(|name| profile.symbols.address(name));
    for (key, said, names) in [
        ("SYMBOL(_stext)", info.text_start, &["_stext"][..]),
        (
            "SYMBOL(init_top_pgt)",
            info.page_table_root,
            &["init_top_pgt", "swapper_pg_dir"],
        ),
    ] {
        if let (Some(said), Some(found)) = (said, symbol(names))
            && said != found
        {
            all.push((key, format!("{said:x}"), format!("{} at {found}", names[0])));
        }
    }
    let five = mode == PagingMode::FiveLevel;
    if let Some(said) = info.five_levels
        && said != five
    {
        let levels = if five { "five" } else { "four" };
        let found = format!("page tables of {levels} levels");
        all.push((
            "NUMBER(pgtable_l5_enabled)",
            u8::from(said).to_string(),
            found,
        ));
    }
    if let (Some(said), Some(found)) = (&info.build_id, &profile.build_id)
        && said != found
    {
        all.push((
            "BUILD-ID",
            said.to_string(),
            format!("the build id {found}"),
        ));
    }
    if let Some(said) = &info.release {
        let release = profile.banner.split(' ').nth(2).unwrap_or_default();
        if !release.is_empty() && said != release {
            all.push((
                "OSRELEASE",
                said.clone(),
                format!("the banner's {release:?}"),
            ));
        }
    }
    all
}
