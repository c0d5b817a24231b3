//! Requests to a collector, and what its answers mean.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::{HeaderMap, HeaderName, HeaderValue, Uri};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};

use super::{Collector, CollectorError};
use crate::queue::{Failure, Sent, Transport};

/// How long a request may take in all.
const PATIENCE: Duration = Duration::from_secs(15);

/// Records of one request: with the longest ones some megabytes, of which
/// collectors take twenty.
const BATCH: usize = 64;

/// Bytes of an answer that are read.
const LONGEST_ANSWER: u64 = 64 << 10;

/// The most certificates of a file.
const MOST_CERTIFICATES: usize = 1000;

/// What was given, found right.
pub(crate) struct Setup {
    agent: Agent,
    url: String,
    headers: HeaderMap,
}

impl Setup {
    pub(crate) fn new(collector: &Collector) -> Result<Self, CollectorError> {
        let wrong = || CollectorError::Endpoint(collector.endpoint.clone());
        let base = collector.endpoint.trim_end_matches('/');
        let url = if base.ends_with("/v1/logs") {
            base.to_owned()
        } else {
            format!("{base}/v1/logs")
        };
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        if !matches!(uri.scheme_str(), Some("http" | "https"))
            || uri.host().is_none_or(str::is_empty)
        {
            return Err(wrong());
        }
        let mut headers = HeaderMap::new();
        for (name, value) in &collector.headers {
            let wrong = |text: &str| CollectorError::Header(text.to_owned());
            let header: HeaderName = name.parse().map_err(|_| wrong(name))?;
            let value: HeaderValue = value.parse().map_err(|_| wrong(name))?;
            headers.insert(header, value);
        }
        let mut tls = TlsConfig::builder();
        if collector.authorities.is_some() {
            tls = tls.root_certs(RootCerts::new_with_certs(&authorities(collector)?));
        }
        let agent = Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .tls_config(tls.build())
            .build()
            .new_agent();
        Ok(Self {
            agent,
            url,
            headers,
        })
    }
}

fn authorities(collector: &Collector) -> Result<Vec<Certificate<'static>>, CollectorError> {
    let Some(path) = &collector.authorities else {
        return Ok(Vec::new());
    };
    let wrong = |reason: String| CollectorError::Authorities {
        path: path.clone(),
        reason,
    };
    let text = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let mut certificates = Vec::new();
    for item in parse_pem(&text).take(MOST_CERTIFICATES) {
        match item.map_err(|error| wrong(error.to_string()))? {
            PemItem::Certificate(certificate) => certificates.push(certificate),
            _ => {
                return Err(wrong(
                    "something else than certificates is in it".to_owned(),
                ));
            }
        }
    }
    if certificates.is_empty() {
        return Err(wrong("there are none".to_owned()));
    }
    Ok(certificates)
}

/// Sends records to one collector.
pub(crate) struct Http {
    setup: Setup,
    /// What stands around the records of a request.
    around: (Vec<u8>, Vec<u8>),
    /// Records of a refused request that are sent one by one, to lose no more
    /// than those that are wrong.
    alone: usize,
}

impl Http {
    pub(crate) fn new(setup: Setup) -> Self {
        Self {
            setup,
            around: around(),
            alone: 0,
        }
    }

    fn post(&self, records: &[Vec<u8>]) -> Result<Answer, ureq::Error> {
        let (head, tail) = &self.around;
        let mut body = head.clone();
        body.extend_from_slice(&records.join(&b','));
        body.extend_from_slice(tail);
        let mut request = self.setup.agent.post(&self.setup.url);
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.setup.headers.clone());
        }
        let request = request.header("content-type", "application/json");
        let mut response = request.send(&body[..])?;
        let after = response.headers().get("retry-after");
        let after = after
            .and_then(|value| value.to_str().ok())
            .and_then(retry_after);
        // An answer that can't be read in full says no less by its status.
        let text = response.body_mut().with_config().limit(LONGEST_ANSWER);
        let text = text.read_to_vec().unwrap_or_default();
        Ok(Answer {
            status: response.status().as_u16(),
            after,
            text,
        })
    }
}

struct Answer {
    status: u16,
    after: Option<Duration>,
    text: Vec<u8>,
}

impl Transport for Http {
    fn batch(&self) -> usize {
        BATCH
    }

    fn send(&mut self, messages: &[Vec<u8>]) -> Result<Sent, Failure> {
        let count = if self.alone > 0 { 1 } else { messages.len() };
        let failed = |reason, wait| Failure { reason, wait };
        let answer = self.post(messages.get(..count).unwrap_or_default());
        let answer = answer.map_err(|error| failed(error.to_string(), None))?;
        let status = answer.status;
        match status {
            200..=299 => {
                self.alone = self.alone.saturating_sub(1);
                let (rejected, reason) = partial(&answer.text);
                Ok(Sent {
                    messages: count,
                    rejected: rejected.min(count as u64),
                    reason,
                })
            }
            // The specification's table of what may be tried again.
            429 | 502..=504 => Err(failed(format!("it answers {status}"), answer.after)),
            _ if count > 1 => {
                self.alone = count;
                self.send(messages)
            }
            _ => {
                self.alone = self.alone.saturating_sub(1);
                Ok(Sent {
                    messages: count,
                    rejected: count as u64,
                    reason: format!("it answers {status}, for good"),
                })
            }
        }
    }
}

/// What stands before and after the records.
fn around() -> (Vec<u8>, Vec<u8>) {
    let host = rustix::system::uname();
    let host = host.nodename().to_string_lossy().into_owned();
    let process = std::process::id();
    let attribute = |key: &str, value: &str| json!({"key": key, "value": {"stringValue": value}});
    let version = env!("CARGO_PKG_VERSION");
    let resource = json!({"attributes": [
        attribute("service.name", "secmon"),
        attribute("service.version", version),
        attribute("service.instance.id", &format!("{host}:{process}")),
        attribute("host.name", &host),
    ]});
    let scope = json!({"name": "secmon", "version": version});
    let head = format!(
        "{{\"resourceLogs\":[{{\"resource\":{resource},\"scopeLogs\":[{{\"scope\":{scope},\"logRecords\":["
    );
    (head.into_bytes(), b"]}]}]}".to_vec())
}

/// How many records an accepted request did not bring, and why.
fn partial(answer: &[u8]) -> (u64, String) {
    let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
    let partial = answer.get("partialSuccess");
    let rejected = partial.and_then(|partial| partial.get("rejectedLogRecords"));
    let rejected = rejected.and_then(|number| match number {
        Value::String(text) => text.parse().ok(),
        number => number.as_u64(),
    });
    let reason = partial
        .and_then(|partial| partial.get("errorMessage"))
        .and_then(Value::as_str)
        .unwrap_or("no reason was given");
    let reason = crate::text::clean(reason, 200);
    (
        rejected.unwrap_or(0),
        format!("it rejected records: {reason}"),
    )
}

/// `Retry-After`: seconds, or a date.
fn retry_after(text: &str) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(text).ok()?;
    let left = date.timestamp().duration_since(Timestamp::now());
    Some(Duration::try_from(left).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn answers_say_when_and_what() {
        assert_eq!(retry_after(" 7 "), Some(Duration::from_secs(7)));
        let past = retry_after("Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(past, Some(Duration::ZERO));
        let future = retry_after("Fri, 31 Dec 2128 23:59:59 GMT").expect("a date");
        assert!(future > Duration::from_secs(1 << 30));
        assert_eq!(retry_after("soon"), None);
        let answer = br#"{"partialSuccess":{"rejectedLogRecords":"3","errorMessage":"old"}}"#;
        assert_eq!(partial(answer).0, 3);
        assert_eq!(partial(b"{}").0, 0);
        assert_eq!(partial(b"\xff").0, 0);
    }

    #[test]
    fn collectors_that_can_not_be_are_refused() {
        for endpoint in ["", "web", "ftp://x", "http://", "http:///v1/logs"] {
            let collector = Collector {
                endpoint: endpoint.to_owned(),
                ..Collector::default()
            };
            assert!(Setup::new(&collector).is_err(), "{endpoint}");
        }
        let collector = Collector {
            endpoint: "http://x:1/base/".to_owned(),
            headers: vec![("x y".to_owned(), String::new())],
            authorities: None,
        };
        assert!(Setup::new(&collector).is_err());
        let collector = Collector {
            headers: Vec::new(),
            ..collector
        };
        let setup = Setup::new(&collector).expect("right");
        assert_eq!(setup.url, "http://x:1/base/v1/logs");
    }

    proptest! {
        #[test]
        fn any_answer_is_taken(bytes: Vec<u8>, header: String) {
            let _ = (partial(&bytes), retry_after(&header));
        }
    }
}
