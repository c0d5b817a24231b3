//! `secmon verify` with genuine evidence.
#![cfg(feature = "verify")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What the genuine report and quote hold.
const MEASUREMENT: &str = "7a1e5c266c0108dbc9bb94fa926951320940915d0aafb42464bd88b579ea158d3e1a0dc39b2c60bd95b9c480cd81841f";
const MRTD: &str = "91eb2b44d141d4ece09f0c75c2c53d247a3c68edd7fafe8a3520c942a604a407de03ae6dc5f87f27428b2538873118b7";

fn data(name: &str) -> PathBuf {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let folder = crates.expect("a folder").join("confidential/tests/data");
    folder.join(name)
}

fn secmon(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_secmon"));
    command.arg("verify").args(arguments);
    command.output().expect("secmon runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The report as the bytes that a guest gets.
fn report(folder: &Path) -> PathBuf {
    let digits = std::fs::read_to_string(data("snp/report_milan.hex")).expect("a report");
    let pairs = digits.trim().as_bytes().chunks(2);
    let bytes = pairs.map(|pair| {
        let pair = std::str::from_utf8(pair).expect("ASCII");
        u8::from_str_radix(pair, 16).expect("digits")
    });
    let path = folder.join("report.bin");
    std::fs::write(&path, bytes.collect::<Vec<u8>>()).expect("written");
    path
}

#[test]
fn a_genuine_snp_report_is_judged() {
    let folder = tempfile::tempdir().expect("a folder");
    let (report, certificate) = (report(folder.path()), data("snp/vcek_milan.der"));
    let (report, certificate) = (
        report.display().to_string(),
        certificate.display().to_string(),
    );
    let usual = [
        "snp",
        "--report",
        &report,
        "--certificates",
        &certificate,
        "--at",
        "1717200000",
    ];
    let run = |more: &[&str]| secmon(&[&usual[..], more].concat());

    let trusted = run(&["--measurement", MEASUREMENT, "--unbound"]);
    assert_eq!(trusted.status.code(), Some(0), "{}", text(&trusted.stderr));
    let said = text(&trusted.stdout);
    assert!(said.starts_with("verdict      trusted\n"), "{said}");
    assert!(said.contains("not checked: for whom and when"), "{said}");

    let other = "00".repeat(48);
    let zeros = "00".repeat(64);
    let refused = run(&[
        "--measurement",
        &other,
        "--report-data",
        &zeros,
        "--least-tcb",
        "microcode=255",
        "--format",
        "json",
    ]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused.stderr));
    let json: serde_json::Value = serde_json::from_slice(&refused.stdout).expect("JSON");
    assert_eq!(json["trusted"], false);
    let kinds = json["differences"].as_array().expect("differences").iter();
    let kinds: Vec<&str> = kinds.filter_map(|one| one["kind"].as_str()).collect();
    assert_eq!(kinds, ["tcb_too_old", "report_data", "measurement"]);
    assert_eq!(json["reasons"].as_array().map(Vec::len), Some(3));

    // Nothing says what the report is for.
    let unsaid = run(&["--measurement", MEASUREMENT]);
    assert_eq!(unsaid.status.code(), Some(2));
    assert!(text(&unsaid.stderr).contains("--unbound"));
    // The certificate is no report.
    let unusable = secmon(&[
        "snp",
        "--report",
        &certificate,
        "--certificates",
        &certificate,
        "--measurement",
        MEASUREMENT,
        "--unbound",
    ]);
    assert_eq!(unusable.status.code(), Some(2));
    assert!(text(&unusable.stderr).contains("1360 bytes; a report has 1184"));
}

#[test]
fn a_genuine_tdx_quote_is_judged() {
    let (quote, collateral) = (data("tdx/tdx_quote"), data("tdx/tdx_quote_collateral.json"));
    let (quote, collateral) = (
        quote.display().to_string(),
        collateral.display().to_string(),
    );
    let usual = [
        "tdx",
        "--quote",
        &quote,
        "--collateral",
        &collateral,
        "--mrtd",
        MRTD,
        "--unbound",
    ];
    let trusted = secmon(&[&usual[..], &["--at", "1750809600"]].concat());
    assert_eq!(trusted.status.code(), Some(0), "{}", text(&trusted.stdout));
    assert!(text(&trusted.stdout).contains("UpToDate"));
    // The collateral has run out since.
    let late = secmon(&usual);
    assert_eq!(late.status.code(), Some(1));
    assert!(text(&late.stdout).contains("NOT trusted"));
    let swapped = secmon(&[
        "tdx",
        "--quote",
        &quote,
        "--collateral",
        &quote,
        "--mrtd",
        MRTD,
        "--unbound",
    ]);
    assert_eq!(swapped.status.code(), Some(2));
}
