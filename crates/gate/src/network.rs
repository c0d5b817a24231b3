//! The network devices that a target's QEMU names.

/// More network devices than this are in no machine.
const MOST_DEVICES: usize = 256;

/// The devices among what `info network` lists, by the name that `set_link`
/// takes: `NAME: index=0,type=nic,…`, below a hub ` \ PORT: NAME: index=…`.
#[must_use]
pub fn devices(text: &str) -> Vec<String> {
    let lines = text.lines().filter_map(|line| line.split_once(": index="));
    lines
        .filter(|(_, rest)| rest.contains(",type=nic,"))
        .filter_map(|(names, _)| names.rsplit(": ").next())
        .map(|name| name.trim_start_matches([' ', '\\']).to_owned())
        .take(MOST_DEVICES)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn network_devices_are_told_from_their_backends() {
        let text = "user.0: index=0,type=user,net=10.0.2.0,restrict=off\r\n\
            virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \
            \\ network: index=0,type=user,net=10.0.2.0,restrict=on\r\n\
            hub 0\r\n \\ hub0port1: #net010: index=0,type=user,net=10.0.2.0,restrict=off\r\n \
            \\ hub0port0: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57\r\n";
        assert_eq!(devices(text), ["virtio-net-pci.0", "e1000.0"]);
    }

    proptest! {
        #[test]
        fn any_text_lists_no_more_than_it_has_lines(text: String) {
            prop_assert!(devices(&text).len() <= text.lines().count());
        }
    }
}
