//! As much of MQTT 3.1.1 as the rows need. The numbers of sections are those of the OASIS standard.

use super::Heard;
use super::tls::Tls;
use crate::Failure;

const KEEP_ALIVE: u16 = 0;

pub(super) struct Mqtt {
    pub(super) tls: Tls,
    number: usize,
    /// What it subscribes to.
    heard_at: usize,
    /// Everything at QoS 1, in a session that the server keeps.
    stores: bool,
    topic: String,
    packet_id: u16,
    scratch: Vec<u8>,
}

impl Mqtt {
    pub(super) fn new(tls: Tls, number: usize, stores: bool) -> Self {
        Self { tls, number, heard_at: number, stores, topic: topic(number), packet_id: 0, scratch: Vec::new() }
    }

    /// 3.1 CONNECT
    pub(super) fn login(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let clean_session = if self.stores { 0 } else { 0x02 };
        let mut body = b"\0\x04MQTT\x04".to_vec();
        body.push(clean_session);
        body.extend(KEEP_ALIVE.to_be_bytes());
        text(&format!("bench-{}", self.number), &mut body);
        self.seal(0x10, &body, out)
    }

    /// 3.8 SUBSCRIBE
    pub(super) fn subscribe(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        let mut body = vec![0, 1];
        text(&topic(self.heard_at), &mut body);
        body.push(u8::from(self.stores));
        self.seal(0x82, &body, out)
    }

    /// What it subscribes to from now on.
    pub(super) const fn enter(&mut self, number: usize) {
        self.heard_at = number;
    }

    pub(super) fn write_to(&mut self, number: usize) {
        self.topic = topic(number);
    }

    /// 3.3 PUBLISH
    pub(super) fn send(&mut self, message: &[u8], count: usize, out: &mut Vec<u8>) -> Result<(), Failure> {
        let mut packets = core::mem::take(&mut self.scratch);
        packets.clear();
        for _ in 0..count {
            packets.push(if self.stores { 0x32 } else { 0x30 });
            let id_len = if self.stores { 2 } else { 0 };
            length(2 + self.topic.len() + id_len + message.len(), &mut packets);
            text(&self.topic, &mut packets);
            if self.stores {
                self.packet_id = self.packet_id.checked_add(1).unwrap_or(1);
                packets.extend(self.packet_id.to_be_bytes());
            }
            packets.extend_from_slice(message);
        }
        self.tls.seal(&packets, out)?;
        self.scratch = packets;
        Ok(())
    }

    /// 3.12 PINGREQ
    pub(super) fn beat(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        self.tls.seal(&[0xc0, 0], out)
    }

    /// 3.14 DISCONNECT
    pub(super) fn close(&mut self, out: &mut Vec<u8>) -> Result<(), Failure> {
        self.tls.seal(&[0xe0, 0], out)?;
        self.tls.close(out)
    }

    pub(super) fn receive(&mut self, data: &[u8], out: &mut Vec<u8>, heard: &mut Heard) -> Result<usize, Failure> {
        self.tls.open(data)?;
        let mut answers = core::mem::take(&mut self.scratch);
        answers.clear();
        let mut used = 0;
        while let Some((kind, start, end)) = packet(&self.tls.plain[used..])? {
            let body = &self.tls.plain[used + start..used + end];
            used += end;
            match kind >> 4 {
                2 if body.get(1) == Some(&0) => heard.done += 1,
                3 => {
                    heard.messages += 1;
                    if kind & 0x06 != 0 {
                        let topic_len = body.first_chunk().map(|len| usize::from(u16::from_be_bytes(*len)));
                        let id =
                            topic_len.and_then(|len| body.get(2 + len..4 + len)).ok_or("a QoS 1 message has an id")?;
                        answers.extend([0x40, 2]);
                        answers.extend_from_slice(id);
                    }
                }
                4 => heard.stored += 1,
                9 if body.get(2).is_some_and(|granted| granted & 0x80 == 0) => heard.done += 1,
                13 => heard.done += 1,
                _ => return Err(format!("an unexpected packet: {kind:02x} {body:02x?}").into()),
            }
        }
        self.tls.plain.drain(..used);
        if !answers.is_empty() {
            self.tls.seal(&answers, out)?;
        }
        self.scratch = answers;
        Ok(data.len())
    }

    fn seal(&mut self, kind: u8, body: &[u8], out: &mut Vec<u8>) -> Result<(), Failure> {
        let mut packet = vec![kind];
        length(body.len(), &mut packet);
        packet.extend_from_slice(body);
        self.tls.seal(&packet, out)
    }
}

fn topic(number: usize) -> String {
    format!("bench/{number}")
}

fn text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u16).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// 2.2.3
fn length(mut len: usize, out: &mut Vec<u8>) {
    while len >= 0x80 {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
}

/// The first byte of the packet at the front, and where its body begins and ends, once it is there.
fn packet(bytes: &[u8]) -> Result<Option<(u8, usize, usize)>, Failure> {
    let Some((kind, rest)) = bytes.split_first() else { return Ok(None) };
    let mut len = 0;
    for (index, byte) in rest.iter().take(4).enumerate() {
        len |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            let start = 2 + index;
            return Ok((bytes.len() >= start + len).then_some((*kind, start, start + len)));
        }
    }
    if rest.len() < 4 { Ok(None) } else { Err("a length of more than four bytes".into()) }
}
