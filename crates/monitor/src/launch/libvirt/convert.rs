//! A libvirt domain definition, changed so that the guest's RAM is shared.
//!
//! The text is not written anew: the few places that change are cut out and
//! replaced, so that comments, order, quoting and white space of all else stay
//! as they are. Reference: libvirt's "Domain XML format", `memoryBacking`.

use std::ops::Range;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// The longest definition.
const MAX_BYTES: usize = 4 << 20;

/// The deepest nesting.
const MAX_DEPTH: usize = 64;

/// A changed definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversion {
    /// The definition.
    pub xml: String,
    /// What was changed; empty if nothing had to be.
    pub changes: Vec<String>,
    /// What to do besides.
    pub notes: Vec<String>,
}

/// Why a definition can't be changed so.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// Too long.
    #[error("the domain definition has {length} bytes, at most {MAX_BYTES} are read")]
    TooLong {
        /// Its bytes.
        length: usize,
    },
    /// Not XML.
    #[error("the domain definition is no well-formed XML at byte {position}: {reason}")]
    Xml {
        /// Where.
        position: u64,
        /// What is wrong.
        reason: String,
    },
    /// Nested too deep.
    #[error("the domain definition is nested deeper than {MAX_DEPTH} elements")]
    Depth,
    /// Not a domain.
    #[error(
        "this is no libvirt domain definition: its element is <{0}>; `virsh dumpxml --inactive NAME` writes one"
    )]
    NotADomain(String),
    /// A domain of another hypervisor.
    #[error("the domain is of type {0:?}; a monitor sees RAM of QEMU's guests (kvm, qemu)")]
    Type(String),
    /// The guest's memory is encrypted.
    #[error("the domain has <launchSecurity>: its memory is encrypted, no monitor can read it")]
    Confidential,
    /// RAM in several files.
    #[error(
        "the domain has {0} NUMA cells; RAM of more than one can't be shown to a monitor as one device"
    )]
    Numa(usize),
    /// No size.
    #[error("the domain definition has no <memory>")]
    NoMemory,
}

/// What matters of a definition, with where it stands.
#[derive(Default)]
struct Found {
    root: Option<String>,
    domain_type: Option<String>,
    /// The element `memory`, and the RAM's bytes.
    memory: Option<(Range<usize>, u64)>,
    current_memory: Option<Range<usize>>,
    /// The element `memoryBacking` and its content; `None` for an empty
    /// element.
    backing: Option<(Range<usize>, Option<Range<usize>>)>,
    /// The element `source` in it, and its type.
    source: Option<(Range<usize>, String)>,
    /// The element `access` in it, and its mode.
    access: Option<(Range<usize>, String)>,
    /// NUMA cells, those that are not shared with the place of the word.
    cells: usize,
    private_cells: Vec<Range<usize>>,
    confidential: bool,
}

/// Changes a domain definition so that the guest's RAM is shared memory.
///
/// # Errors
/// [`ConvertError`].
pub fn convert(xml: &str) -> Result<Conversion, ConvertError> {
    if xml.len() > MAX_BYTES {
        return Err(ConvertError::TooLong { length: xml.len() });
    }
    let found = find(xml)?;
    let root = found.root.clone().unwrap_or_default();
    if root != "domain" {
        return Err(ConvertError::NotADomain(root));
    }
    match found.domain_type.as_deref() {
        None | Some("kvm" | "qemu") => {}
        Some(other) => return Err(ConvertError::Type(other.to_owned())),
    }
    if found.confidential {
        return Err(ConvertError::Confidential);
    }
    if found.cells > 1 {
        return Err(ConvertError::Numa(found.cells));
    }
    let Some((memory, size)) = found.memory.clone() else {
        return Err(ConvertError::NoMemory);
    };
    // QEMU seals a memfd, so that it can't be made as long as a device needs.
    let kind = if size.is_power_of_two() {
        "memfd"
    } else {
        "file"
    };
    let source_is_shared = |kind: &str| matches!(kind, "memfd" | "file");
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    let mut changes = Vec::new();
    let mut notes = Vec::new();
    let indent = indentation(xml, memory.start);
    let source_text = format!("<source type='{kind}'/>");
    let access_text = "<access mode='shared'/>";
    match &found.backing {
        None => {
            let after = found.current_memory.as_ref().unwrap_or(&memory).end;
            let text = format!(
                "{indent}<memoryBacking>{indent}  {source_text}{indent}  {access_text}{indent}</memoryBacking>"
            );
            edits.push((after..after, text));
            changes.push(format!(
                "added <memoryBacking> with {source_text}{access_text}"
            ));
        }
        Some((element, content)) => {
            let inner = indentation(xml, element.start);
            let mut added = String::new();
            match &found.source {
                Some((_, kind)) if source_is_shared(kind) => {}
                Some((place, old)) => {
                    edits.push((place.clone(), source_text.clone()));
                    changes.push(format!(
                        "changed the source of memory from {old:?} to {kind:?}"
                    ));
                }
                None => {
                    added.push_str(&format!("{inner}  {source_text}"));
                    changes.push(format!("added {source_text}"));
                }
            }
            match &found.access {
                Some((_, mode)) if mode == "shared" => {}
                Some((place, old)) => {
                    edits.push((place.clone(), access_text.to_owned()));
                    changes.push(format!(
                        "changed the access to memory from {old:?} to \"shared\""
                    ));
                }
                None => {
                    added.push_str(&format!("{inner}  {access_text}"));
                    changes.push(format!("added {access_text}"));
                }
            }
            if !added.is_empty() {
                match content {
                    Some(content) => {
                        // Before the white space ahead of the closing tag.
                        let text = xml.get(content.clone()).unwrap_or_default();
                        let at = content.start + text.trim_end().len();
                        edits.push((at..at, added));
                    }
                    None => edits.push((
                        element.clone(),
                        format!("<memoryBacking>{added}{inner}</memoryBacking>"),
                    )),
                }
            }
        }
    }
    for place in &found.private_cells {
        edits.push((place.clone(), "shared".to_owned()));
        changes.push("changed memAccess of the NUMA cell to \"shared\"".to_owned());
    }
    let kind = match &found.source {
        Some((_, kind)) if source_is_shared(kind) => kind.as_str(),
        _ => kind,
    };
    if kind == "file" {
        notes.push(
            "RAM is kept in files of memory_backing_dir of /etc/libvirt/qemu.conf: let it lie on a tmpfs such as /dev/shm"
                .to_owned(),
        );
    } else if !size.is_power_of_two() {
        notes.push(format!(
            "RAM of {size} bytes in a memfd can't be shown to a monitor: QEMU seals the memfd, and a device's memory is a power of two; use <source type='file'/>, or 512 MiB, 1, 2, 4 … GiB"
        ));
    }
    if !changes.is_empty() {
        notes.push(
            "the guest has to be started anew: `virsh define FILE`, then shut it down and start it"
                .to_owned(),
        );
    }
    Ok(Conversion {
        xml: spliced(xml, edits),
        changes,
        notes,
    })
}

fn spliced(xml: &str, mut edits: Vec<(Range<usize>, String)>) -> String {
    edits.sort_by_key(|(place, _)| (place.start, place.end));
    let mut out = String::with_capacity(xml.len() + 256);
    let mut done = 0;
    for (place, text) in edits {
        out.push_str(xml.get(done..place.start).unwrap_or_default());
        out.push_str(&text);
        done = place.end;
    }
    out.push_str(xml.get(done..).unwrap_or_default());
    out
}

/// A line end and the white space that stands before the element at
/// `position`, if that is all that does.
fn indentation(xml: &str, position: usize) -> String {
    let before = xml.get(..position).unwrap_or_default();
    let line = before.rfind('\n').map_or(0, |end| end + 1);
    let white = before.get(line..).unwrap_or_default();
    if line > 0 && white.chars().all(|c| c == ' ' || c == '\t') {
        format!("\n{white}")
    } else {
        String::new()
    }
}

fn find(xml: &str) -> Result<Found, ConvertError> {
    let mut reader = Reader::from_str(xml);
    let mut found = Found::default();
    let mut path: Vec<(String, usize)> = Vec::new();
    let mut text_of_memory = String::new();
    let mut unit = String::new();
    loop {
        let start = position(&reader);
        let failed = |position: u64, reason: String| ConvertError::Xml { position, reason };
        let event = reader
            .read_event()
            .map_err(|error| failed(reader.error_position(), error.to_string()))?;
        let end = position(&reader);
        match event {
            Event::Start(element) => {
                if path.len() >= MAX_DEPTH {
                    return Err(ConvertError::Depth);
                }
                let name = String::from_utf8_lossy(element.name().as_ref()).into_owned();
                path.push((name, start));
                let names: Vec<&str> = path.iter().map(|(name, _)| name.as_str()).collect();
                if names == ["domain", "memory"] {
                    unit = attribute(&element, "unit").unwrap_or_default();
                }
                seen(xml, &mut found, &names, &element, start..end);
                if names == ["domain", "memoryBacking"] {
                    found.backing = Some((start..end, Some(end..end)));
                }
            }
            Event::Empty(element) => {
                let name = String::from_utf8_lossy(element.name().as_ref()).into_owned();
                let mut names: Vec<&str> = path.iter().map(|(name, _)| name.as_str()).collect();
                names.push(&name);
                seen(xml, &mut found, &names, &element, start..end);
                if names == ["domain", "memoryBacking"] {
                    found.backing = Some((start..end, None));
                }
            }
            Event::Text(text) => {
                let names: Vec<&str> = path.iter().map(|(name, _)| name.as_str()).collect();
                if names == ["domain", "memory"] {
                    text_of_memory.push_str(&String::from_utf8_lossy(&text));
                }
            }
            Event::End(_) => {
                let names: Vec<&str> = path.iter().map(|(name, _)| name.as_str()).collect();
                let opened = path.last().map_or(start, |(_, opened)| *opened);
                match names.as_slice() {
                    ["domain", "memory"] => {
                        let size = bytes(&text_of_memory, &unit).unwrap_or(0);
                        found.memory = Some((opened..end, size));
                    }
                    ["domain", "currentMemory"] => found.current_memory = Some(opened..end),
                    ["domain", "memoryBacking"] => {
                        if let Some((element, Some(content))) = &mut found.backing {
                            *element = opened..end;
                            *content = content.start..start;
                        }
                    }
                    ["domain", "memoryBacking", "source"] => {
                        if let Some((place, _)) = &mut found.source {
                            *place = opened..end;
                        }
                    }
                    ["domain", "memoryBacking", "access"] => {
                        if let Some((place, _)) = &mut found.access {
                            *place = opened..end;
                        }
                    }
                    _ => {}
                }
                path.pop();
            }
            Event::Eof => {
                if let Some((name, opened)) = path.last() {
                    return Err(failed(*opened as u64, format!("<{name}> is not closed")));
                }
                return Ok(found);
            }
            _ => {}
        }
    }
}

fn position(reader: &Reader<&[u8]>) -> usize {
    usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX)
}

/// Notes an element that matters.
fn seen(
    xml: &str,
    found: &mut Found,
    names: &[&str],
    element: &BytesStart<'_>,
    place: Range<usize>,
) {
    match names {
        [root] => {
            found.root = Some((*root).to_owned());
            found.domain_type = attribute(element, "type");
        }
        ["domain", "launchSecurity"] => found.confidential = true,
        ["domain", "memoryBacking", "source"] => {
            found.source = Some((place, attribute(element, "type").unwrap_or_default()));
        }
        ["domain", "memoryBacking", "access"] => {
            found.access = Some((place, attribute(element, "mode").unwrap_or_default()));
        }
        ["domain", "cpu", "numa", "cell"] => {
            found.cells += 1;
            if attribute(element, "memAccess").as_deref() == Some("private") {
                let tag = xml.get(place.clone()).unwrap_or_default();
                let value = tag
                    .find("memAccess")
                    .and_then(|at| Some(at + tag.get(at..)?.find("private")?));
                if let Some(value) = value {
                    let start = place.start + value;
                    found.private_cells.push(start..start + "private".len());
                }
            }
        }
        _ => {}
    }
}

fn attribute(element: &BytesStart<'_>, name: &str) -> Option<String> {
    let attribute = element.try_get_attribute(name).ok()??;
    Some(String::from_utf8_lossy(&attribute.value).into_owned())
}

/// A size with libvirt's unit, KiB unless stated.
fn bytes(text: &str, unit: &str) -> Option<u64> {
    let factor: u64 = match unit {
        "b" | "bytes" => 1,
        "KB" => 1_000,
        "" | "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    };
    text.trim().parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: &str = "<!-- kept -->\n<domain type='kvm'>\n  <name>web1</name>\n  <memory unit='MiB'>512</memory>\n  <currentMemory unit='KiB'>524288</currentMemory>\n  <vcpu>1</vcpu>\n</domain>\n";

    #[test]
    fn a_domain_without_backing_gets_one_and_nothing_else_changes() {
        let conversion = convert(PLAIN).expect("converted");
        let added = "\n  <memoryBacking>\n    <source type='memfd'/>\n    <access mode='shared'/>\n  </memoryBacking>";
        assert_eq!(conversion.xml.replace(added, ""), PLAIN);
        assert!(conversion.xml.contains(added));
        let again = convert(&conversion.xml).expect("converted again");
        assert_eq!(again.xml, conversion.xml);
        assert_eq!(again.changes, [""; 0]);
    }

    #[test]
    fn what_a_backing_says_besides_stays() {
        let with = |backing: &str| PLAIN.replace("  <vcpu>", &format!("  {backing}\n  <vcpu>"));
        let huge = with(
            "<memoryBacking>\n    <hugepages/>\n    <access mode=\"private\"/>\n  </memoryBacking>",
        );
        let converted = convert(&huge).expect("converted").xml;
        let expected = "<memoryBacking>\n    <hugepages/>\n    <access mode='shared'/>\n    <source type='memfd'/>\n  </memoryBacking>";
        assert!(converted.contains(expected), "{converted}");
        let empty = convert(&with("<memoryBacking/>")).expect("converted").xml;
        assert!(empty.contains("<memoryBacking>\n    <source type='memfd'/>\n    <access mode='shared'/>\n  </memoryBacking>"), "{empty}");
        let anonymous = with("<memoryBacking><source type='anonymous'></source></memoryBacking>");
        let converted = convert(&anonymous).expect("converted").xml;
        assert!(
            converted.contains("<source type='memfd'/>") && !converted.contains("anonymous"),
            "{converted}"
        );
    }

    #[test]
    fn other_sizes_are_kept_in_a_file() {
        let odd = PLAIN.replace("512</memory>", "1536</memory>");
        let conversion = convert(&odd).expect("converted");
        assert!(conversion.xml.contains("<source type='file'/>"));
        assert!(
            conversion
                .notes
                .iter()
                .any(|note| note.contains("memory_backing_dir"))
        );
        assert_eq!(bytes(" 1536 ", "MiB"), Some(1536 << 20));
        assert_eq!(bytes("4", ""), Some(4096));
        assert_eq!(bytes("4", "parsec"), None);
    }

    #[test]
    fn a_private_numa_cell_becomes_shared() {
        let numa = PLAIN.replace(
            "  <vcpu>",
            "  <cpu><numa><cell id='0' memory='512' unit='MiB' memAccess='private'/></numa></cpu>\n  <vcpu>",
        );
        let converted = convert(&numa).expect("converted").xml;
        assert!(converted.contains("memAccess='shared'"), "{converted}");
        let two = numa.replace("</numa>", "<cell id='1'/></numa>");
        assert!(matches!(convert(&two), Err(ConvertError::Numa(2))));
    }

    #[test]
    fn what_can_not_be_shared_is_refused() {
        let refused = |xml: &str| convert(xml).expect_err("refused").to_string();
        assert!(refused("<network/>").contains("<network>"));
        assert!(refused("<domain type='xen'><memory>4</memory></domain>").contains("xen"));
        assert!(refused("<domain><launchSecurity type='sev'/></domain>").contains("encrypted"));
        assert!(refused("<domain></domain>").contains("no <memory>"));
        assert!(refused("<domain><memory>4</domain>").contains("well-formed"));
        assert!(refused("<domain>").contains("not closed"));
        assert!(refused(&"<a>".repeat(100)).contains("deeper"));
    }

    proptest! {
        #[test]
        fn any_text_is_converted_or_refused(text in "[<>/a-z='\" &;!-]{0,80}|\\PC{0,80}") {
            let _ = convert(&text);
        }

        #[test]
        fn a_damaged_definition_never_panics(at in 0..PLAIN.len(), byte in "[<>/'\"&\\x00-\\x7f]") {
            let mut text = PLAIN.to_owned();
            text.replace_range(at..=at, &byte);
            if let Ok(conversion) = convert(&text) {
                prop_assert!(convert(&conversion.xml).is_ok_and(|again| again.changes.is_empty()));
            }
        }
    }
}
