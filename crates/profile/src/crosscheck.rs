//! Compares what a kernel says about itself with what was found without it.

use secmon_memory::PagingMode;

use crate::locate::BANNER_START;
use crate::tables::START_KERNEL_MAP;
use crate::{KernelImage, Profile, VmcoreInfo};

/// Whether `other`, found where a banner stood, is that of another kernel than
/// `banner`. It is read a second time, so that by now it can be anything.
pub(crate) fn is_of_another_kernel(other: &str, banner: &str) -> bool {
    let says_a_version = other
        .as_bytes()
        .strip_prefix(BANNER_START)
        .and_then(<[u8]>::first)
        .is_some_and(u8::is_ascii_digit);
    // The log buffer holds the same text, without an end; from 6.1 on a copy
    // from before the build had a number is among the constants.
    says_a_version && !other.starts_with(banner) && !is_without_number_or_date(other, banner)
}

/// Whether `other` is the copy of `banner` that is made before a build has got
/// a number and a date (`init/version.c` from 6.1 on): of "… #1 SMP DATE (more)"
/// either may be missing, or both, and nothing else.
fn is_without_number_or_date(other: &str, banner: &str) -> bool {
    let (Some((start, whole)), Some((other_start, left))) =
        (banner.rsplit_once(" #"), other.rsplit_once(" #"))
    else {
        return false;
    };
    let (Some((number, whole)), Some((other_number, left))) =
        (whole.split_once(' '), left.split_once(' '))
    else {
        return false;
    };
    let same_number = number == other_number
        || number.trim_start_matches(|c: char| c.is_ascii_digit()) == other_number;
    let (kind, whole) = split_kind(whole);
    let (other_kind, left) = split_kind(left);
    let left = left.trim_start();
    // The date ends before a space, or at the end.
    let same_end = whole
        .strip_suffix(left)
        .is_some_and(|date| date.is_empty() || left.is_empty() || date.ends_with(' '));
    start == other_start && same_number && kind == other_kind && same_end
}

/// Splits what a kernel was built for, "SMP PREEMPT_DYNAMIC", from the rest.
fn split_kind(text: &str) -> (Vec<&str>, &str) {
    let mut kind = Vec::new();
    let mut rest = text;
    loop {
        let (word, after) = rest.split_once(' ').unwrap_or((rest, ""));
        if word != "SMP" && !word.starts_with("PREEMPT") {
            return (kind, rest);
        }
        kind.push(word);
        rest = after;
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

#[cfg(test)]
mod tests {
    use super::*;

    const START: &str = "Linux version 6.8.0 (who@where) (gcc #9) ";

    #[track_caller]
    fn check(banner: &str, other: &str, expected: bool) {
        let (banner, other) = (format!("{START}{banner}"), format!("{START}{other}"));
        let found = is_without_number_or_date(&other, &banner);
        assert_eq!(found, expected, "{other:?} of {banner:?}");
    }

    #[test]
    fn a_copy_without_number_or_date_is_no_other_banner() {
        let debian = "#1 SMP PREEMPT_DYNAMIC Debian 6.8.1-1 (2024-02-03)";
        check(debian, debian, true);
        check(
            debian,
            "# SMP PREEMPT_DYNAMIC Debian 6.8.1-1 (2024-02-03)",
            true,
        );
        let ubuntu = "#32-Ubuntu SMP PREEMPT_DYNAMIC Wed Jul 16 UTC 2 (Ubuntu 6.8.0-1.2)";
        check(
            ubuntu,
            "#32-Ubuntu SMP PREEMPT_DYNAMIC  (Ubuntu 6.8.0-1.2)",
            true,
        );
        let plain = "#7 SMP Wed Jul 16 12:51:16 UTC 2025";
        check(plain, "# SMP ", true);
        check(plain, "# SMP", true);
        check(plain, "#7 SMP 12:51:16 UTC 2025", true);
    }

    #[test]
    fn what_stands_where_a_banner_stood_can_be_anything() {
        let banner = format!("{START}#7 SMP Wed Jul 16 12:51:16 UTC 2025");
        for other in ["", "Linux", "Linux version ", "Linux version x", "\u{fffd}"] {
            assert!(!is_of_another_kernel(other, &banner), "{other:?}");
        }
        // The length of "Linux version " ends inside a character of this.
        assert!(!is_of_another_kernel(&"\u{fffd}".repeat(40), &banner));
        assert!(is_of_another_kernel(
            "Linux version 6.9.0 (who) #1",
            &banner
        ));
        assert!(!is_of_another_kernel(
            &format!("{banner} and more"),
            &banner
        ));
    }

    #[test]
    fn another_banner_is_another() {
        let banner = "#7 SMP PREEMPT Wed Jul 16 12:51:16 UTC 2025";
        check(banner, "#8 SMP PREEMPT Wed Jul 16 12:51:16 UTC 2025", false);
        check(banner, "#7 SMP Wed Jul 16 12:51:16 UTC 2025", false);
        check(banner, "#7 SMP PREEMPT Wed Jul 16 12:51:16 UTC 2026", false);
        check(banner, "# SMP PREEMPT 025", false);
        check(banner, "", false);
        check("", banner, false);
        let moved = format!("Linux version 6.9.0 (who@where) {banner}");
        assert!(!is_without_number_or_date(
            &moved,
            &format!("{START}{banner}")
        ));
    }
}
