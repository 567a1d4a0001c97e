//! As much of the NATS client protocol as the rows need, and of JetStream's interface.

use std::io::Read;
use std::net::TcpStream;

use super::Heard;
use super::tls::Tls;
use crate::Failure;

const STREAM: &str = "BENCH";
/// Subscriptions: messages, publish acknowledgements, answers of JetStream's interface.
const MESSAGES: &str = "1";
const STORED: &str = "2";
const ANSWERS: &str = "3";

pub(super) struct Nats {
    pub(super) tls: Tls,
    number: usize,
    /// What it subscribes to.
    heard_at: usize,
    /// Everything by way of JetStream.
    stores: bool,
    subject: String,
    scratch: Vec<u8>,
}

impl Nats {
    /// Reads the INFO that comes in clear, up to the line's end and no further.
    pub(super) fn greet(stream: &mut TcpStream) -> Result<(), Failure> {
        let (mut line, mut byte) = (Vec::new(), [0]);
        while !line.ends_with(b"\r\n") {
            stream.read_exact(&mut byte)?;
            line.extend(byte);
        }
        if line.starts_with(b"INFO ") { Ok(()) } else { Err("no NATS server".into()) }
    }

    pub(super) fn new(tls: Tls, number: usize, stores: bool) -> Self {
        Self { tls, number, heard_at: number, stores, subject: subject(number, stores), scratch: Vec::new() }
    }

    pub(super) fn login(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let options =
            r#"{"verbose":false,"pedantic":false,"tls_required":true,"lang":"rust","version":"0","protocol":1}"#;
        let mut lines = format!("CONNECT {options}\r\n");
        if self.stores {
            let inbox = self.inbox();
            lines += &format!("SUB {inbox}.stored {STORED}\r\nSUB {inbox}.api {ANSWERS}\r\n");
        }
        lines += "PING\r\n";
        self.tls.seal(lines.as_bytes(), out)
    }

    pub(super) fn subscribe(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let lines = format!("SUB {} {MESSAGES}\r\nPING\r\n", subject(self.heard_at, false));
        self.tls.seal(lines.as_bytes(), out)
    }

    pub(super) fn sync(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        self.tls.seal(b"PING\r\n", out)
    }

    /// Makes the stream that keeps what is sent.
    pub(super) fn make_stream(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let config = format!(
            r#"{{"name":"{STREAM}","subjects":["kept.*"],"retention":"workqueue","storage":"file","discard":"new","max_msgs":-1,"max_bytes":-1,"max_age":0,"num_replicas":1}}"#
        );
        self.request(&format!("$JS.API.STREAM.CREATE.{STREAM}"), &config, out)
    }

    /// Makes the consumer that gives this client what was kept for it, each to be acknowledged.
    pub(super) fn consume(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let (name, inbox) = (format!("c{}", self.number), self.inbox());
        self.tls.seal(format!("SUB {inbox}.kept {MESSAGES}\r\n").as_bytes(), out)?;
        let config = format!(
            r#"{{"stream_name":"{STREAM}","config":{{"durable_name":"{name}","deliver_subject":"{inbox}.kept","deliver_policy":"all","ack_policy":"explicit","ack_wait":60000000000,"max_ack_pending":1000,"filter_subject":"{}"}}}}"#,
            subject(self.number, true)
        );
        self.request(&format!("$JS.API.CONSUMER.DURABLE.CREATE.{STREAM}.{name}"), &config, out)
    }

    fn request(&mut self, to: &str, body: &str, out: &mut Vec<u8>) -> Result<(), Failure> {
        let line = format!("PUB {to} {}.api {}\r\n{body}\r\n", self.inbox(), body.len());
        self.tls.seal(line.as_bytes(), out)
    }

    /// What it subscribes to from now on.
    pub(super) const fn enter(&mut self, number: usize) {
        self.heard_at = number;
    }

    pub(super) fn write_to(&mut self, number: usize) {
        self.subject = subject(number, self.stores);
    }

    pub(super) fn send(&mut self, message: &[u8], count: usize, out: &mut Vec<u8>) -> Result<(), Failure> {
        let mut lines = core::mem::take(&mut self.scratch);
        lines.clear();
        for _ in 0..count {
            lines.extend_from_slice(b"PUB ");
            lines.extend_from_slice(self.subject.as_bytes());
            if self.stores {
                lines.extend_from_slice(format!(" {}.stored", self.inbox()).as_bytes());
            }
            lines.extend_from_slice(format!(" {}\r\n", message.len()).as_bytes());
            lines.extend_from_slice(message);
            lines.extend_from_slice(b"\r\n");
        }
        self.tls.seal(&lines, out)?;
        self.scratch = lines;
        Ok(())
    }

    pub(super) fn receive(&mut self, data: &[u8], out: &mut Vec<u8>, heard: &mut Heard) -> Result<usize, Failure> {
        self.tls.open(data)?;
        let mut answers = core::mem::take(&mut self.scratch);
        answers.clear();
        let mut used = 0;
        loop {
            let rest = &self.tls.plain[used..];
            let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") else { break };
            let line = core::str::from_utf8(&rest[..end])?;
            let (operation, arguments) = line.split_once(' ').unwrap_or((line, ""));
            let mut len = end + 2;
            match operation {
                "MSG" => {
                    let mut words = arguments.split(' ');
                    let (_, id, last) = (words.next(), words.next(), words.next_back());
                    let reply = words.next();
                    let body_len: usize = last.and_then(|word| word.parse().ok()).ok_or("a message has a length")?;
                    let Some(body) = rest.get(len..len + body_len) else { break };
                    len += body_len + 2;
                    if rest.len() < len {
                        break;
                    }
                    match id {
                        Some(MESSAGES) => {
                            heard.messages += 1;
                            if let Some(reply) = reply {
                                answers.extend_from_slice(format!("PUB {reply} 0\r\n\r\n").as_bytes());
                            }
                        }
                        Some(STORED | ANSWERS) if body.windows(7).any(|part| part == b"\"error\"") => {
                            return Err(String::from_utf8_lossy(body).into_owned().into());
                        }
                        Some(STORED) => heard.stored += 1,
                        Some(ANSWERS) => heard.done += 1,
                        _ => return Err("a message that nobody has subscribed to".into()),
                    }
                }
                "PING" => answers.extend_from_slice(b"PONG\r\n"),
                "PONG" => heard.done += 1,
                "INFO" | "+OK" => {}
                _ => return Err(line.to_owned().into()),
            }
            used += len;
        }
        self.tls.plain.drain(..used);
        if !answers.is_empty() {
            self.tls.seal(&answers, out)?;
        }
        self.scratch = answers;
        Ok(data.len())
    }

    fn inbox(&self) -> String {
        format!("_INBOX.{}", self.number)
    }
}

/// Where messages for this client go; those to be kept to the stream.
fn subject(number: usize, kept: bool) -> String {
    if kept { format!("kept.{number}") } else { format!("bench.{number}") }
}
