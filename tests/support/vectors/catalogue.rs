//! PROTOCOL 7 and 12, 1.6 and 8.4: every message, the identity page, the URL, seeds.

use super::json::{Fields, Json};
use super::reference::{Rsa, crc32, exchange_public, hash, join, mac, signing_public};
use super::{Keys, head, random};

pub(super) fn files(keys: &Keys) -> Vec<(&'static str, Fields)> {
    vec![
        ("messages.json", messages()),
        ("page.json", page(keys)),
        ("url.json", url(keys)),
        ("randomness.json", randomness()),
    ]
}

/// A payload that grows as its fields are named: PROTOCOL 7.1.
struct Writer {
    name: &'static str,
    fields: Fields,
    payload: Vec<u8>,
}

impl Writer {
    fn new(name: &'static str, code: u16) -> Self {
        Self { name, fields: Fields::new(), payload: code.to_be_bytes().to_vec() }
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.payload.push(u8::try_from(value & 0x7f | 0x80).expect("a byte"));
            value >>= 7;
        }
        self.payload.push(u8::try_from(value).expect("a byte"));
    }

    /// u16, u32 or u64.
    fn number(mut self, name: &str, value: u64) -> Self {
        self.varint(value);
        self.fields.put(name, value);
        self
    }

    /// u8: a rung, a reason, a set of rungs.
    fn byte(mut self, name: &str, value: u8) -> Self {
        self.payload.push(value);
        self.fields.put(name, value);
        self
    }

    fn flag(mut self, name: &str, value: bool) -> Self {
        self.payload.push(value.into());
        self.fields.put(name, value);
        self
    }

    fn array(mut self, name: &str, bytes: &[u8]) -> Self {
        self.payload.extend(bytes);
        self.fields.put_hex(name, bytes);
        self
    }

    fn bytes(mut self, name: &str, bytes: &[u8]) -> Self {
        self.varint(u64::try_from(bytes.len()).expect("short"));
        self.array(name, bytes)
    }

    fn string(mut self, name: &str, text: &str) -> Self {
        self.varint(u64::try_from(text.len()).expect("short"));
        self.payload.extend(text.as_bytes());
        self.fields.put(name, text);
        self
    }

    /// An option that is not there.
    fn none(mut self, name: &str) -> Self {
        self.payload.push(0);
        self.fields.put(name, Json::Nothing);
        self
    }

    /// The mark of one that is.
    fn some(mut self) -> Self {
        self.payload.push(1);
        self
    }

    /// Fields of a type of 7.3, under one name.
    fn group(mut self, name: &str, write: impl FnOnce(Self) -> Self) -> Self {
        let inner = write(Self { name: "", fields: Fields::new(), payload: Vec::new() });
        self.payload.extend(inner.payload);
        self.fields.put(name, inner.fields);
        self
    }

    fn subject_id(self, id: &[u8; 16]) -> Self {
        self.group("subject", |writer| writer.variant(0).array("id", id))
    }

    fn subject_name(self, name: &str) -> Self {
        self.group("subject", |writer| writer.variant(1).string("name", name))
    }

    fn post(self, epoch: u32, kind: u8, signature: &[u8; 64], body: &[u8]) -> Self {
        self.group("post", |writer| {
            writer
                .number("number", 1_790_000_000_123)
                .number("at", 1_790_000_000_123)
                .number("epoch", epoch.into())
                .byte("kind", kind)
                .bytes("signature", signature)
                .bytes("body", body)
        })
    }

    /// Lines of PROTOCOL 7.5, as bytes.
    fn changes(mut self, all: Vec<Self>) -> Self {
        let bytes: Vec<u8> = all.iter().flat_map(|line| line.payload.clone()).collect();
        self.varint(u64::try_from(bytes.len()).expect("short"));
        self.payload.extend(bytes);
        self.fields.put("lines", Json::List(all.into_iter().map(|line| Json::Fields(line.fields)).collect()));
        self
    }

    /// A list of lines of one length, as bytes.
    fn lines(mut self, name: &str, all: &[Vec<u8>]) -> Self {
        let bytes = all.concat();
        self.varint(u64::try_from(bytes.len()).expect("short"));
        self.payload.extend(bytes);
        self.fields.put(name, Json::List(all.iter().map(|line| Json::Text(hex::encode(line))).collect()));
        self
    }

    fn variant(mut self, number: u8) -> Self {
        self.payload.push(number);
        self
    }

    fn online(self) -> Self {
        self.group("status", |mut writer| {
            writer.fields.put("online", true);
            writer.variant(0)
        })
    }

    fn offline(self, last_seen: Option<u64>) -> Self {
        self.group("status", |mut writer| {
            writer.fields.put("online", false);
            match last_seen {
                Some(time) => writer.variant(1).some().number("last_seen", time),
                None => writer.variant(1).none("last_seen"),
            }
        })
    }

    fn bundle(self, bundle: &[u8], signature: &[u8]) -> Self {
        self.group("bundle", |writer| writer.bytes("bundle", bundle).bytes("signature", signature))
    }

    fn receipt(
        self,
        rung: u8,
        reason: Option<u8>,
        chain: [u8; 8],
        (from, to): (u32, u32),
        tag: Option<[u8; 16]>,
    ) -> Self {
        let writer = self.byte("rung", rung);
        let writer = match reason {
            Some(reason) => writer.some().byte("reason", reason),
            None => writer.none("reason"),
        };
        let writer = writer.array("chain", &chain).number("from", from.into()).number("to", to.into());
        match tag {
            Some(tag) => writer.some().array("tag", &tag),
            None => writer.none("tag"),
        }
    }

    fn end(self, case: &str) -> Fields {
        let code = u16::from_be_bytes([self.payload[0], self.payload[1]]);
        Fields::new()
            .with("case", case)
            .with("message", self.name)
            .with("code", format!("{code:04x}"))
            .with("body", self.fields)
            .hex("payload", self.payload)
    }
}

/// Those that PROTOCOL 7.1 prints, under the names there, and then what it does not print.
fn messages() -> Fields {
    let w = Writer::new;
    let short: (&[u8], &[u8]) = (&[1; 4], &[2; 4]);
    let real: (&[u8], &[u8]) = (&[0xb1; 184], &[0x51; 384]);
    let (modulus, signature) = (&[10; 4][..], &[11; 4][..]);
    let five = [5; 16];
    let line = |writer: Writer, name: &str, id: &[u8; 16]| writer.array("id", id).string("name", name);
    // A list is no type of its own: the lines stand one after the other.
    let lines = |mut writer: Writer, all: Vec<Writer>| {
        let mut list = Vec::new();
        for line in all {
            writer.payload.extend(line.payload);
            list.push(Json::Fields(line.fields));
        }
        writer.fields.put("lines", Json::List(list));
        writer
    };
    let empty = || Writer { name: "", fields: Fields::new(), payload: Vec::new() };
    let (sid, decided, sealed) = ([14; 16], [11; 64], vec![17; 117]);
    let member = |id: u8| [[id; 16].as_slice(), &[id + 1; 32]].concat();
    let everybody: Vec<_> = (100..164).map(member).collect();
    let cases = vec![
        w("Init", 0x0000)
            .number("request", 13)
            .array("sid", &sid)
            .byte("flags", 1)
            .bytes("signature", &decided)
            .lines("members", &[member(5), member(7)])
            .lines("names", core::slice::from_ref(&sealed))
            .end("Init"),
        w("Init", 0x0000)
            .number("request", 300)
            .array("sid", &sid)
            .byte("flags", 0)
            .bytes("signature", &decided)
            .lines("members", &everybody)
            .lines("names", &vec![sealed.clone(); 63])
            .end("Init, of a group of 64"),
        w("CloseConversation", 0x0100)
            .number("request", 15)
            .array("sid", &sid)
            .bytes("signature", &decided)
            .end("CloseConversation"),
        w("Closed", 0x0120)
            .array("sid", &sid)
            .some()
            .array("by", &five)
            .some()
            .bytes("signature", &decided)
            .end("Closed"),
        w("Closed", 0x0120).array("sid", &sid).none("by").none("signature").end("Closed-server"),
        w("Send", 0x0200).byte("wanted", 4).array("envelope", &[7; 37]).end("Send"),
        w("Send", 0x0200).byte("wanted", 15).array("envelope", &[0xfe; 1_000]).end("Send, everything wanted"),
        w("Say", 0x0201).number("request", 16).post(3, 0, &decided, b"hello, all").end("Say"),
        w("Say", 0x0201).number("request", 300).post(u32::MAX, 127, &decided, &[0xfe; 800]).end("Say, the longest"),
        w("Follow", 0x0202).number("request", 17).number("after", 299).end("Follow"),
        w("Follow", 0x0202).number("request", 17).number("after", u64::MAX).end("Follow, behind the highest number"),
        w("FollowResponse", 0x0212)
            .number("request", 17)
            .flag("more", false)
            .changes(vec![empty().number("seq", 300).array("author", &five).post(3, 0, &decided, b"hello, all")])
            .end("FollowResponse"),
        w("FollowResponse", 0x0212)
            .number("request", 300)
            .flag("more", true)
            .changes(vec![
                empty().number("seq", 1).array("author", &five).post(1, 1, &decided, &[0xff]),
                empty().number("seq", 300).array("author", &[7; 16]).post(9, 127, &decided, &[7; 800]),
            ])
            .end("FollowResponse, and there is more"),
        w("FollowResponse", 0x0212)
            .number("request", 18)
            .flag("more", false)
            .changes(Vec::new())
            .end("FollowResponse, empty"),
        w("News", 0x0222).end("News"),
        w("Told", 0x0210).receipt(3, None, [3; 8], (1, 200), Some([4; 16])).end("Told"),
        w("Told", 0x0210).receipt(1, None, [3; 8], (0, 0), None).end("Told, accepted"),
        w("Told", 0x0210).receipt(5, Some(8), [3; 8], (65_535, 65_535), None).end("Told, refused by the server"),
        w("ToldBy", 0x0211)
            .array("from", &[7; 16])
            .group("receipt", |writer| writer.receipt(5, Some(9), [3; 8], (1, 200), None))
            .end("ToldBy"),
        w("ToldBy", 0x0211)
            .array("from", &[7; 16])
            .group("receipt", |writer| writer.receipt(4, None, [3; 8], (0, 65_535), Some([4; 16])))
            .end("ToldBy, opened"),
        w("Deliver", 0x0220).byte("wanted", 0).array("envelope", &[7; 37]).end("Deliver"),
        w("Waited", 0x0221).number("seq", 300).number("at", 1_790_000_000).end("Waited"),
        w("Tell", 0x0230).receipt(5, Some(13), [3; 8], (7, 7), None).end("Tell"),
        w("Tell", 0x0230).receipt(4, None, [3; 8], (0, 65_535), Some([4; 16])).end("Tell, opened"),
        w("Acknowledge", 0x0231).number("seq", 300).end("Acknowledge"),
        w("Acknowledge", 0x0231).number("seq", u64::MAX).end("Acknowledge, the highest number"),
        w("Answer", 0x0300)
            .number("request", 14)
            .array("sid", &sid)
            .flag("accept", true)
            .bytes("signature", &decided)
            .end("Answer"),
        w("Answer", 0x0300)
            .number("request", 14)
            .array("sid", &sid)
            .flag("accept", false)
            .bytes("signature", &decided)
            .end("Answer, declined"),
        w("Invite", 0x0320)
            .array("sid", &sid)
            .array("creator", &five)
            .byte("flags", 1)
            .bytes("signature", &decided)
            .lines("members", &[member(5), member(7)])
            .bytes("name", &sealed)
            .end("Invite"),
        w("MemberChanged", 0x0321)
            .array("sid", &sid)
            .array("member", &[7; 16])
            .byte("state", 0)
            .some()
            .bytes("signature", &decided)
            .end("MemberChanged"),
        w("MemberChanged", 0x0321)
            .array("sid", &sid)
            .array("member", &[7; 16])
            .byte("state", 2)
            .none("signature")
            .end("MemberChanged-late"),
        w("MemberChanged", 0x0321)
            .array("sid", &sid)
            .array("member", &[7; 16])
            .byte("state", 3)
            .none("signature")
            .end("MemberChanged, revoked"),
        w("Status", 0x0400).number("request", 300).end("Status"),
        w("StatusResponse", 0x0410).number("request", 65_535).end("StatusResponse"),
        w("Lookup", 0x0500)
            .number("request", 1)
            .flag("key", true)
            .flag("bundle", true)
            .subject_name("bob")
            .end("Lookup"),
        w("Lookup", 0x0500)
            .number("request", 2)
            .flag("key", false)
            .flag("bundle", true)
            .subject_id(&five)
            .end("Lookup-id"),
        w("LookupResponse", 0x0510)
            .number("request", 2)
            .group("entry", |entry| {
                line(entry, "bob", &five)
                    .number("key_epoch", 0)
                    .number("record_limit", 16_408)
                    .offline(Some(1_700_000_000))
                    .none("modulus")
                    .some()
                    .bundle(&[1; 184], short.1)
            })
            .end("LookupResponse"),
        w("LookupResponse", 0x0510)
            .number("request", 3)
            .group("entry", |entry| {
                line(entry, "Zoë-01", &five)
                    .number("key_epoch", 2)
                    .number("record_limit", 1_024)
                    .online()
                    .some()
                    .bytes("modulus", &[0xa1; 384])
                    .none("bundle")
            })
            .end("LookupResponse, with a key and without a bundle"),
        w("List", 0x0501).number("request", 3).string("after", "").end("List"),
        w("List", 0x0501).number("request", 4).string("after", "carol").end("List, the next page"),
        lines(
            w("ListResponse", 0x0511).number("request", 3).flag("more", false),
            vec![line(empty(), "bob", &five).online(), line(empty(), "carol", &[6; 16]).offline(None)],
        )
        .end("ListResponse"),
        lines(w("ListResponse", 0x0511).number("request", 4).flag("more", false), Vec::new())
            .end("ListResponse, empty"),
        w("Enrol", 0x0502)
            .number("request", 4)
            .number("index", 0)
            .number("count", 1)
            .array("id", &five)
            .string("name", "s-1")
            .bytes("modulus", modulus)
            .bytes("signature", signature)
            .end("Enrol"),
        w("Revoke", 0x0503).number("request", 5).subject_name("s-1").end("Revoke"),
        w("Rotate", 0x0504)
            .number("request", 9)
            .number("key_epoch", 1)
            .bytes("modulus", modulus)
            .bytes("signature", signature)
            .bytes("proof", &[13; 4])
            .bundle(short.0, short.1)
            .end("Rotate"),
        w("Successor", 0x0505).number("request", 10).array("id", &five).number("key_epoch", 0).end("Successor"),
        w("SuccessorResponse", 0x0515)
            .number("request", 10)
            .bytes("modulus", modulus)
            .bytes("signature", signature)
            .end("SuccessorResponse"),
        w("Watch", 0x0600).number("request", 11).string("pattern", "s-*").string("after", "").end("Watch"),
        w("Watch", 0x0600)
            .number("request", 300)
            .string("pattern", "{ä,é}-[!0-4]?*")
            .string("after", "carol")
            .end("Watch, the next page"),
        w("Unwatch", 0x0601).number("request", 12).string("pattern", "s-*").end("Unwatch"),
        w("WatchResponse", 0x0610)
            .number("request", 11)
            .string("next", "carol")
            .changes(vec![
                line(empty(), "bob", &five).some().online(),
                line(empty(), "carol", &[6; 16]).some().offline(Some(1_700_000_000)),
            ])
            .end("WatchResponse"),
        w("WatchResponse", 0x0610)
            .number("request", 300)
            .string("next", "")
            .changes(Vec::new())
            .end("WatchResponse, the last page, and empty"),
        w("Changed", 0x0620)
            .flag("lost", false)
            .changes(vec![line(empty(), "bob", &five).none("status")])
            .end("Changed"),
        w("Changed", 0x0620)
            .flag("lost", true)
            .changes(vec![line(empty(), "dora", &[7; 16]).some().offline(None)])
            .end("Changed, and some was lost"),
        w("Listening", 0x0700).end("Listening"),
        w("NotListening", 0x0701).end("NotListening"),
        w("Settings", 0x0720)
            .array("channel", &[0; 16])
            .number("valid_for", 0)
            .number("heartbeat", 15)
            .number("timeout", 45)
            .number("time", 1_790_000_000)
            .number("waiting", 0)
            .array("store_epoch", &[1, 2, 3, 4, 5, 6, 7, 8])
            .end("Settings"),
        w("Settings", 0x0720)
            .array("channel", &[0xff; 16])
            .number("valid_for", u32::MAX.into())
            .number("heartbeat", u16::MAX.into())
            .number("timeout", u16::MAX.into())
            .number("time", u64::MAX)
            .number("waiting", u32::MAX.into())
            .array("store_epoch", &[0xff; 8])
            .end("Settings, the largest numbers"),
        w("Channels", 0x0800).number("request", 9).end("Channels"),
        w("ChannelsResponse", 0x0810)
            .number("request", 9)
            .some()
            .group("first", |channel| channel.array("channel", &[10; 16]).number("valid_for", 604_800))
            .none("second")
            .end("ChannelsResponse"),
        w("ExpireChannels", 0x0801).number("request", 10).end("ExpireChannels"),
        w("Close", 0x0821).some().byte("reason", 19).end("Close"),
        w("Close", 0x0821).none("reason").end("Close, without a reason"),
        w("KeyUpdate", 0x0822).end("KeyUpdate"),
        w("Publish", 0x0b00).number("request", 6).bundle(short.0, short.1).end("Publish"),
        w("Publish", 0x0b00).number("request", 128).bundle(real.0, real.1).end("Publish, of real lengths"),
        w("Wrap", 0x0b01)
            .number("request", 7)
            .array("to", &five)
            .bytes("wrap", &[12; 4])
            .bundle(short.0, short.1)
            .end("Wrap"),
        w("Wrap", 0x0b01)
            .number("request", 127)
            .array("to", &five)
            .bytes("wrap", &[12; 244])
            .bundle(real.0, real.1)
            .end("Wrap, of real lengths"),
        w("WrapDelivery", 0x0b20)
            .array("from", &five)
            .bytes("wrap", &[12; 4])
            .bundle(short.0, short.1)
            .end("WrapDelivery"),
        w("Done", 0x0f00).number("request", 7).end("Done"),
        w("Refused", 0x0f10).number("request", 8).byte("reason", 12).some().number("retry_after", 1_000).end("Refused"),
        w("Refused", 0x0f10).number("request", 0).byte("reason", 1).none("retry_after").end("Refused, of no request"),
    ];
    let malformed: [(&str, &[u8]); 22] = [
        ("no code", &[]),
        ("half a code", &[4]),
        ("Status without a body", &[4, 0]),
        ("Status with a byte too many", &[4, 0, 1, 0]),
        ("a u16 of four bytes", &[4, 0, 0x80, 0x80, 0x80, 0]),
        ("a u16 above 65,535", &[4, 0, 0x80, 0x80, 4]),
        ("a varint that does not end", &[4, 0, 0x80]),
        ("Send without wanted", &[2, 0]),
        ("Send that wants what there is not", &[2, 0, 0x10]),
        ("a rung that there is not", &[2, 0x30, 6, 0, 3, 3, 3, 3, 3, 3, 3, 3, 0, 0, 0]),
        ("rung 0", &[2, 0x30, 0, 0, 3, 3, 3, 3, 3, 3, 3, 3, 0, 0, 0]),
        ("a bool of 2", &[5, 0, 1, 2, 0, 1, 1, 0x61]),
        ("a subject that there is not", &[5, 0, 1, 0, 0, 2, 1, 0x61]),
        ("a name longer than the payload", &[5, 0, 1, 0, 0, 1, 2, 0x61]),
        ("a name that is not UTF-8", &[5, 0, 1, 0, 0, 1, 1, 0xff]),
        ("Listening with a body", &[7, 0, 0]),
        ("KeyUpdate with a body", &[8, 0x22, 0]),
        ("Close with an option of 2", &[8, 0x21, 2, 1]),
        ("Close with a reason that there is not", &[8, 0x21, 1, 21]),
        ("Close with reason 0", &[8, 0x21, 1, 0]),
        ("Refused that is cut", &[0x0f, 0x10, 8, 12, 1]),
        ("an id that is cut", &[5, 3, 5, 0, 1, 2, 3]),
    ];
    let malformed = malformed.map(|(why, payload)| Fields::new().with("why", why).hex("payload", payload)).to_vec();
    let longer: [(&str, u16, &[u8]); 2] =
        [("two bytes for 1", 1, &[4, 0, 0x81, 0]), ("three bytes for 0", 0, &[4, 0, 0x80, 0x80, 0])];
    let longer = longer
        .map(|(why, request, payload)| Fields::new().with("why", why).with("request", request).hex("payload", payload));
    head("Every message of the catalogue as a payload", &["7.1", "7.3", "7.4"])
        .with("cases", cases)
        .with("malformed", malformed)
        .with("longer_than_needed", longer.to_vec())
}

/// PROTOCOL 12.
struct Page<'a> {
    id: [u8; 16],
    name: &'a str,
    key: &'a Rsa,
    address: [u8; 4],
    port: u16,
    server: &'a Rsa,
    owner_id: [u8; 16],
    owner_name: &'a str,
    owner: &'a Rsa,
    /// Whether it has a policy, which is that the owner's invitations are accepted.
    policy: bool,
}

impl Page<'_> {
    /// What stands behind the head, and the owner's bundle in it.
    fn body(&self) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let text = |name: &str| join(&[&[u8::try_from(name.len()).expect("a short name")], name.as_bytes()]);
        let modulus =
            |key: &Rsa| join(&[&u16::try_from(key.modulus.len()).expect("short").to_be_bytes(), &key.modulus]);
        let bundle = join(&[
            &self.owner_id,
            &self.owner.fingerprint(),
            &3_u32.to_be_bytes(),
            &exchange_public(&[0x51; 32]),
            &exchange_public(&[0x52; 32]),
            &2_u32.to_be_bytes(),
            &signing_public(&[0x53; 32]),
            &[0; 32],
        ]);
        let signature =
            self.owner.sign("ossicle bundle", &hash(&[&bundle]), &random(&format!("page {}", self.name))).signature;
        // Leading zeros, where the number is shorter.
        let wide = |number: &[u8], len: usize| join(&[&vec![0; len - number.len()], number]);
        let body = join(&[
            &self.id,
            &text(self.name),
            &wide(&self.key.d, 256),
            &wide(&self.key.p, 128),
            &wide(&self.key.q, 128),
            &self.address,
            &self.port.to_be_bytes(),
            &modulus(self.server),
            &self.owner_id,
            &text(self.owner_name),
            &modulus(self.owner),
            &bundle,
            &signature,
            if self.policy { &[1] } else { &[] },
        ]);
        (body, bundle, signature)
    }

    fn case(&self, name: &str) -> Fields {
        let (body, bundle, signature) = self.body();
        let given = Fields::new()
            .hex("id", self.id)
            .with("name", self.name)
            .with("key", self.key.name)
            .with("address", self.address.map(|byte| byte.to_string()).join("."))
            .with("port", self.port)
            .with("server_key", self.server.name)
            .hex("owner_id", self.owner_id)
            .with("owner_name", self.owner_name)
            .with("owner_key", self.owner.name)
            .hex("owner_bundle", bundle)
            .hex("owner_signature", signature)
            .with("groups", if self.policy { "owner" } else { "none" });
        let gives = Fields::new()
            .with("length", u32::try_from(16 + body.len()).expect("short"))
            .with("crc32", format!("{:08x}", checksum(&body)))
            .hex("page", if self.policy { with_policy(&body) } else { whole(&body) });
        Fields::new().with("name", name).with("given", given).with("gives", gives)
    }
}

fn page_len(body: &[u8]) -> [u8; 2] {
    u16::try_from(16 + body.len()).expect("short").to_be_bytes()
}

fn checksum(body: &[u8]) -> u32 {
    crc32(&[&page_len(body), body])
}

/// A page of this body, with the head that belongs to it.
fn whole(body: &[u8]) -> Vec<u8> {
    join(&[b"OSSICLE\0\0\x01", &page_len(body), &checksum(body).to_be_bytes(), body])
}

/// The same of the version that ends in a policy.
fn with_policy(body: &[u8]) -> Vec<u8> {
    let mut page = whole(body);
    page[9] = 2;
    page
}

fn page(keys: &Keys) -> Fields {
    let small = Page {
        id: [0xb0; 16],
        name: "sensor-01",
        key: &keys.bob,
        address: [10, 0, 2, 2],
        port: 5150,
        server: &keys.server,
        owner_id: [0xc1; 16],
        owner_name: "alice",
        owner: &keys.alice,
        policy: false,
    };
    let large = Page {
        name: "sensor-with-a-name-as-long-as-names-can-be-which-is-64-bytes-x-y",
        server: &keys.server3072,
        owner_name: "Zoë",
        owner: &keys.server3072,
        port: 65_535,
        policy: true,
        ..small
    };
    assert_eq!(large.name.len(), 64);
    let body = small.body().0;
    let good = whole(&body);
    let changed = |at: usize, byte: u8| {
        let mut page = good.clone();
        page[at] = byte;
        page
    };
    let edited = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut body = body.clone();
        edit(&mut body);
        whole(&body)
    };
    let (server_len, d) = (16 + 1 + 9 + 512 + 4 + 2, 16 + 1 + 9);
    let refused = [
        ("erased flash", "missing", vec![0xff; 64]),
        ("nothing", "missing", Vec::new()),
        ("another magic", "missing", changed(7, 1)),
        ("another version", "version", changed(9, 3)),
        ("the version with a policy, and none", "broken", changed(9, 2)),
        ("a policy that there is not", "broken", with_policy(&edited(&|body| body.push(2))[16..])),
        ("a policy in the version without one", "broken", edited(&|body| body.push(1))),
        ("a flipped bit of the checksum", "broken", changed(12, good[12] ^ 1)),
        ("a flipped bit of the key", "broken", changed(16 + d, good[16 + d] ^ 1)),
        ("a length that is too short, with the checksum as it was", "broken", changed(11, good[11] - 1)),
        ("cut, as its length says", "broken", good[..good.len() - 1].to_vec()),
        ("an empty name", "broken", edited(&|body| drop(body.splice(16..26, [0])))),
        ("a name that is not UTF-8", "broken", edited(&|body| body[17] = 0xff)),
        (
            "a server's key of another length",
            "broken",
            edited(&|body| body[server_len..server_len + 2].copy_from_slice(&[1, 1])),
        ),
        ("a server's modulus that is even", "broken", edited(&|body| body[server_len + 2 + 255] &= 0xfe)),
        ("a byte behind the signature", "broken", edited(&|body| body.push(0))),
        ("a byte too few", "broken", edited(&|body| body.truncate(body.len() - 1))),
    ];
    let refused =
        refused.map(|(why, result, page)| Fields::new().with("why", why).hex("page", page).with("result", result));
    head("Identity pages, and what is none", &["12"])
        .with("cases", vec![small.case("2048 bits"), large.case("the longest name, keys of 3072 bits")])
        .with("refused", refused.to_vec())
}

/// Base64url without padding (RFC 4648, 5).
fn base64url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let digits = |chunk: &[u8]| {
        let number = (0..3).fold(0, |number, i| number << 8 | u32::from(chunk.get(i).copied().unwrap_or(0)));
        (0..=chunk.len())
            .map(move |i| char::from(DIGITS[usize::try_from(number >> (18 - 6 * i) & 63).expect("6 bits")]))
    };
    bytes.chunks(3).flat_map(digits).collect()
}

/// PROTOCOL 1.6.
fn url(keys: &Keys) -> Fields {
    let fingerprint = hex::encode(keys.server.fingerprint());
    let (id, secret) = ([7; 8], [0xfb; 16]);
    let token = base64url(&join(&[&id, &secret]));
    let case = |url: String, host: &str, port: u16, fingerprint: Option<&str>, with_token: bool| {
        Fields::new()
            .with("url", url)
            .with("host", host)
            .with("port", port)
            .with("fingerprint", fingerprint)
            .with("token", with_token.then(|| Fields::new().hex("id", id).hex("secret", secret)))
    };
    let pinned = Some(fingerprint.as_str());
    let cases = vec![
        case(format!("ossicle://chat.example:5150#{fingerprint}.{token}"), "chat.example", 5150, pinned, true),
        case(format!("ossicle://chat.example#{fingerprint}"), "chat.example", 5150, pinned, false),
        case(format!("ossicle://192.0.2.1:443#{fingerprint}"), "192.0.2.1", 443, pinned, false),
        case(format!("ossicle://[2001:db8::1]:65535#{fingerprint}.{token}"), "2001:db8::1", 65_535, pinned, true),
        case(format!("ossicle://[::1]#{fingerprint}"), "::1", 5150, pinned, false),
        case("ossicle://localhost:5150".into(), "localhost", 5150, None, false),
    ];
    let refused = [
        ("another scheme", format!("https://chat.example#{fingerprint}")),
        ("no host", format!("ossicle://:5150#{fingerprint}")),
        ("port 0", format!("ossicle://chat.example:0#{fingerprint}")),
        ("port 65,536", format!("ossicle://chat.example:65536#{fingerprint}")),
        ("a fingerprint of 63 digits", format!("ossicle://chat.example#{}", &fingerprint[1..])),
        ("a fingerprint of 65 digits", format!("ossicle://chat.example#0{fingerprint}")),
        ("an empty fingerprint", "ossicle://chat.example#".into()),
        ("a token of 31 characters", format!("ossicle://chat.example#{fingerprint}.{}", &token[1..])),
        ("a token with padding", format!("ossicle://chat.example#{fingerprint}.{token}=")),
        ("a token in another alphabet", format!("ossicle://chat.example#{fingerprint}.{}", token.replace('-', "+"))),
        ("an empty token", format!("ossicle://chat.example#{fingerprint}.")),
    ];
    assert!(token.len() == 32 && token.contains('-'), "the alphabet is seen");
    let refused = refused.map(|(why, url)| Fields::new().with("why", why).with("url", url));
    head("A server's URL", &["1.6"]).with("cases", cases).with("refused", refused.to_vec())
}

/// PROTOCOL 8.4.
fn randomness() -> Fields {
    let case = |entropy: &[u8], secret: &[u8]| {
        let key = hash(&[b"ossicle entropy\0", entropy]);
        Fields::new()
            .hex("entropy", entropy)
            .hex("secret", secret)
            .hex("key", key)
            .hex("seed", mac(&key, &[b"ossicle generator\0", secret]))
    };
    head("Seeds of a generator from fresh entropy and a stored secret", &["8.4"])
        .with("cases", vec![case(&[0xe1; 32], &[0x5c; 256]), case(&[], b"stored"), case(b"fresh", &[])])
}
