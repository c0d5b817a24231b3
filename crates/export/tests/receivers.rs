//! Events arrive at receivers that others wrote, and at ones that fail.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use secmon_export::{Bounds, otlp, syslog};
use secmon_guest::TrustLevel;
use secmon_watch::{Event, Incident, Sink, SinkError};

/// For what must happen on any machine, however slow.
const PATIENCE: Duration = Duration::from_secs(60);

fn event(sequence: u64) -> Event {
    Event {
        sequence,
        time_ms: 1_790_000_000_123,
        target: "qemu:\"web\"]\\1".to_owned(),
        trust_level: TrustLevel::L0,
        incident: Incident::Blind {
            detector: "tracing".to_owned(),
            reason: format!("no list\nof ops ä {sequence}"),
        },
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its number").port()
}

/// Gives events until all are taken, whatever is told meanwhile.
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "no {what} within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A real syslog server, which writes what it understood of each message.
struct Rsyslog(Child);

impl Drop for Rsyslog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn rsyslog(folder: &Path, tcp: u16, udp: u16) -> Rsyslog {
    let at = |name: &str| folder.join(name).display().to_string();
    let configuration = format!(
        r#"global(workDirectory="{}")
module(load="imtcp")
module(load="imudp")
input(type="imtcp" address="127.0.0.1" port="{tcp}")
input(type="imudp" address="127.0.0.1" port="{udp}")
template(name="fields" type="string" string="%syslogfacility%.%syslogseverity%|%protocol-version%|%timereported:::date-rfc3339%|%app-name%|%msgid%|%structured-data%|%msg%\n")
action(type="omfile" file="{}" template="fields")
"#,
        folder.display(),
        at("received"),
    );
    std::fs::write(folder.join("conf"), configuration).expect("written");
    let child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "/usr/sbin/rsyslogd", "-n", "-f"])
        .args([&at("conf"), "-i", &at("pid")])
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(folder.join("errors")).expect("a file"))
        .spawn()
        .expect("setpriv (package util-linux) and rsyslogd (package rsyslog)");
    Rsyslog(child)
}

#[test]
fn a_real_syslog_server_understands_each_field() {
    let folder = tempfile::tempdir().expect("a folder");
    let (tcp, udp) = (free_port(), free_port());
    let _server = rsyslog(folder.path(), tcp, udp);
    let received = || {
        let text = std::fs::read_to_string(folder.path().join("received"));
        text.unwrap_or_default()
    };
    wait_for("server", || TcpStream::connect(("127.0.0.1", tcp)).ok());
    for (scheme, port) in [("tcp", tcp), ("udp", udp)] {
        let address = format!("{scheme}://127.0.0.1:{port}");
        let address: syslog::Address = address.parse().expect("an address");
        let sink = syslog::start(address, syslog::Facility::SECURITY, Bounds::default());
        let mut sink = sink.expect("a thread");
        let before = received().lines().count();
        for sequence in 0..3 {
            sink.take(&event(sequence)).expect("taken");
        }
        sink.close(PATIENCE).expect("nothing lost");
        wait_for(scheme, || {
            (received().lines().count() == before + 3).then_some(())
        });
    }
    for (number, line) in (0..).zip(received().lines()) {
        let fields: Vec<&str> = line.splitn(7, '|').collect();
        assert_eq!(fields[..2], ["10.4", "1"], "{line}");
        assert!(fields[2].starts_with("2026-09-21T14:13:20.123"), "{line}");
        assert_eq!(fields[3..5], ["secmon", "blind"]);
        let data = format!(
            r#"[secmon@32473 sequence="{}" target="qemu:\"web\"\]\\1" trust_level="L0" detector="tracing"]"#,
            number % 3
        );
        assert_eq!(fields[5], data);
        let text = fields[6].trim_start_matches('\u{feff}');
        let said = format!("tracing can't look: no list\\nof ops ä {}", number % 3);
        assert_eq!(text, said, "{line}");
    }
}

#[test]
fn the_local_socket_gets_a_message_each() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("set");
    let address = format!("unix:{}", path.display());
    let address: syslog::Address = address.parse().expect("an address");
    let sink = syslog::start(address, syslog::Facility::SECURITY, Bounds::default());
    let mut sink = sink.expect("a thread");
    sink.take(&event(1)).expect("taken");
    let mut message = [0; 8192];
    let length = socket.recv(&mut message).expect("a message");
    let message = String::from_utf8_lossy(&message[..length]);
    assert!(
        message.starts_with("<84>1 2026-09-21T14:13:20.123Z "),
        "{message}"
    );
}

#[test]
fn nothing_waits_for_a_server_and_what_is_lost_is_told() {
    let port = free_port();
    let address = format!("tcp://127.0.0.1:{port}");
    let address: syslog::Address = address.parse().expect("an address");
    let bounds = Bounds {
        events: 3,
        bytes: 1 << 20,
    };
    let sink = syslog::start(address, syslog::Facility::SECURITY, bounds);
    let mut sink = sink.expect("a thread");
    let (mut lost, mut delayed) = (0, 0);
    let mut count = |outcome: Result<(), SinkError>| match outcome {
        Ok(()) => {}
        Err(SinkError::Lost { lost: events, .. }) => lost += events,
        Err(SinkError::Delayed { .. }) => delayed += 1,
    };
    for sequence in 0..5 {
        count(sink.take(&event(sequence)));
    }
    // The exporter's thread may not have found out by then.
    wait_for("told trouble", || {
        let told = sink.idle();
        let is_delayed = matches!(told, Err(SinkError::Delayed { .. }));
        count(told);
        is_delayed.then_some(())
    });
    let server = TcpListener::bind(("127.0.0.1", port)).expect("the port");
    let (stream, _) = server.accept().expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut reader = BufReader::new(stream);
    for sequence in 0..3 {
        let mut length = Vec::new();
        reader.read_until(b' ', &mut length).expect("a length");
        let length = String::from_utf8(length).expect("digits");
        let mut message = vec![0; length.trim().parse().expect("a number")];
        reader.read_exact(&mut message).expect("a message");
        let message = String::from_utf8(message).expect("UTF-8");
        assert!(
            message.contains(&format!("sequence=\"{sequence}\"")),
            "{message}"
        );
    }
    sink.close(PATIENCE).expect("all told");
    assert_eq!((lost, delayed), (2, 1));
}

/// A collector that answers as it is told to, and gives each request's body.
fn collector(answers: Vec<&'static str>) -> (String, Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}", listener.local_addr().expect("its number"));
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut answers = answers.into_iter();
        while let Ok((stream, _)) = listener.accept() {
            let mut reader = BufReader::new(stream);
            let (mut head, mut length) = (String::new(), 0);
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line).unwrap_or(0) == 0 {
                    break;
                }
                let lower = line.to_lowercase();
                if let Some(number) = lower.strip_prefix("content-length:") {
                    length = number.trim().parse().expect("a length");
                }
                if line == "\r\n" {
                    break;
                }
                head.push_str(&lower);
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).expect("a body");
            let answer = answers.next().unwrap_or("200 OK\r\n\r\n{}");
            let (status, text) = answer.split_once("\r\n\r\n").expect("an answer");
            let length = text.len();
            let answer = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{text}"
            );
            reader.get_mut().write_all(answer.as_bytes()).expect("sent");
            if sender.send((head, body)).is_err() {
                return;
            }
        }
    });
    (endpoint, receiver)
}

fn export_to(endpoint: &str) -> secmon_export::Exporter {
    let collector = otlp::Collector {
        endpoint: endpoint.to_owned(),
        headers: vec![("x-tenant".to_owned(), "blue".to_owned())],
        authorities: None,
    };
    otlp::start(&collector, Bounds::default()).expect("a collector")
}

#[test]
fn a_collector_gets_records_by_the_protocols_own_types() {
    let (endpoint, requests) = collector(Vec::new());
    let mut sink = export_to(&endpoint);
    sink.take(&event(9)).expect("taken");
    let (head, body) = requests.recv_timeout(PATIENCE).expect("a request");
    assert!(head.starts_with("post /v1/logs http/1.1"), "{head}");
    assert!(head.contains("content-type: application/json") && head.contains("x-tenant: blue"));
    let request: ExportLogsServiceRequest = serde_json::from_slice(&body).expect("OTLP");
    let [logs] = request.resource_logs.as_slice() else {
        panic!("{request:?}");
    };
    let resource = logs.resource.as_ref().expect("a resource");
    let named = |key: &str| resource.attributes.iter().any(|found| found.key == key);
    assert!(named("service.name") && named("service.version") && named("host.name"));
    let record = &logs.scope_logs[0].log_records[0];
    assert_eq!(record.time_unix_nano, 1_790_000_000_123_000_000);
    assert!(record.observed_time_unix_nano > 0);
    assert_eq!(
        (record.severity_number, &*record.severity_text),
        (13, "WARNING")
    );
    assert_eq!(record.event_name, "secmon.blind");
    let value = |key: &str| {
        let found = record.attributes.iter().find(|found| found.key == key);
        found.and_then(|found| found.value.clone()?.value)
    };
    assert_eq!(value("secmon.sequence"), Some(Any::IntValue(9)));
    let target = Any::StringValue("qemu:\"web\"]\\1".to_owned());
    assert_eq!(value("secmon.target"), Some(target));
    let body = record.body.clone().and_then(|body| body.value);
    let said = "tracing can't look: no list\\nof ops ä 9".to_owned();
    assert_eq!(body, Some(Any::StringValue(said)));
}

#[test]
fn what_a_collector_does_not_take_is_sent_again_or_told() {
    let (endpoint, requests) = collector(vec![
        "503 Busy\r\nRetry-After: 0\r\n\r\n",
        "200 OK\r\n\r\n{\"partialSuccess\":{}}",
        "400 Bad Request\r\n\r\n",
        "200 OK\r\n\r\n{\"partialSuccess\":{\"rejectedLogRecords\":\"1\",\"errorMessage\":\"old\"}}",
    ]);
    let mut sink = export_to(&endpoint);
    sink.take(&event(1)).expect("taken");
    let (_, first) = requests.recv_timeout(PATIENCE).expect("a request");
    let (_, again) = requests.recv_timeout(PATIENCE).expect("the same again");
    assert_eq!(first, again);
    let mut lost_of = |sequence| {
        let mut told = sink.take(&event(sequence));
        requests.recv_timeout(PATIENCE).expect("a request");
        wait_for("loss", || {
            let lost = match std::mem::replace(&mut told, Ok(())) {
                Err(SinkError::Lost { lost, reason, .. }) => Some((lost, reason)),
                _ => None,
            };
            told = sink.idle();
            lost
        })
    };
    let (lost, reason) = lost_of(2);
    assert!(lost == 1 && reason.contains("400"), "{reason}");
    let (lost, reason) = lost_of(3);
    assert!(lost == 1 && reason.contains("old"), "{reason}");
    sink.close(PATIENCE).expect("nothing else is lost");
}
