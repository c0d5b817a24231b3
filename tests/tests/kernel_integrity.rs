//! What a rootkit edits in a kernel, found by the detectors of the kernel's
//! code; and nothing found on the same guest untouched.

use secmon_lab::Suite;
use secmon_tests::{edits, images, open};

fn check(suite: Suite) {
    let image = images::quiet_file(suite).expect("an image");
    let opened = open::image(&image).expect("the image holds a kernel");
    let count = edits::each_edit_is_found(&image, &opened.kernel).expect("all edits are found");
    println!("{suite:?}: {count} edits found, none without an edit");
}

#[test]
fn edits_of_a_5_10_kernel_are_found() {
    check(Suite::Bullseye);
}

#[test]
fn edits_of_a_6_1_kernel_are_found() {
    check(Suite::Bookworm);
}

#[test]
fn edits_of_a_6_12_kernel_are_found() {
    check(Suite::Trixie);
}

#[test]
fn edits_of_a_7_2_kernel_are_found() {
    check(Suite::Sid);
}
