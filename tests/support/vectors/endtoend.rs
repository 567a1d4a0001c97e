//! PROTOCOL 8 to 10: bundles, rotations, safety numbers, conversations, wraps, chains, receipts.

use super::json::{Fields, Json};
use super::reference::{
    Rsa, aead, array, ed25519, exchange_public, expand, hash, hpke_derive, hpke_seal, join, mac, signing_public,
};
use super::{Keys, head, random};

#[derive(Clone, Copy)]
struct Member {
    id: [u8; 16],
    key: [u8; 32],
}

impl Member {
    fn fields(&self) -> Fields {
        Fields::new().hex("id", self.id).hex("key", self.key)
    }
}

/// A client's bundle with the private halves behind it.
#[derive(Clone, Copy)]
struct Bundle {
    member: Member,
    epoch: u32,
    exchange: [u8; 32],
    prekey: [u8; 32],
    prekey_id: u32,
    signing: [u8; 32],
    previous: [u8; 32],
}

impl Bundle {
    fn bytes(&self) -> Vec<u8> {
        join(&[
            &self.member.id,
            &self.member.key,
            &self.epoch.to_be_bytes(),
            &exchange_public(&self.exchange),
            &exchange_public(&self.prekey),
            &self.prekey_id.to_be_bytes(),
            &signing_public(&self.signing),
            &self.previous,
        ])
    }

    fn hash(&self) -> [u8; 32] {
        hash(&[&self.bytes()])
    }

    fn given(&self) -> Fields {
        self.member
            .fields()
            .with("epoch", self.epoch)
            .hex("exchange_private", self.exchange)
            .hex("prekey_private", self.prekey)
            .with("prekey_id", self.prekey_id)
            .hex("verifying_private", self.signing)
            .hex("previous", self.previous)
    }

    fn gives(&self) -> Fields {
        Fields::new()
            .hex("exchange", exchange_public(&self.exchange))
            .hex("prekey", exchange_public(&self.prekey))
            .hex("verifying", signing_public(&self.signing))
            .hex("bundle", self.bytes())
            .hex("H(bundle)", self.hash())
    }
}

const A: Member = Member { id: [1; 16], key: [2; 32] };
const B: Member = Member { id: [3; 16], key: [4; 32] };
const C: Member = Member { id: [5; 16], key: [6; 32] };

/// The bundle of C in PROTOCOL 15.6.
fn third() -> Bundle {
    Bundle {
        member: C,
        epoch: 1,
        exchange: [0x81; 32],
        prekey: [0x82; 32],
        prekey_id: 7,
        signing: [0x83; 32],
        previous: [0; 32],
    }
}

/// The bundles of PROTOCOL 15.3.
fn bundles() -> (Bundle, Bundle) {
    let bundle = |member, epoch, byte: u8, prekey_id| Bundle {
        member,
        epoch,
        exchange: [byte; 32],
        prekey: [byte + 1; 32],
        prekey_id,
        signing: [byte + 2; 32],
        previous: [0; 32],
    };
    (bundle(A, 9, 0x51, 10), bundle(B, 3, 0x61, 4))
}

fn direct_sid(a: &[u8; 16], b: &[u8; 16], counter: u32) -> [u8; 16] {
    array(&hash(&[b"ossicle direct\0", a.min(b), a.max(b), &counter.to_be_bytes()])[..16])
}

fn members_hash(sid: &[u8; 16], version: u32, members: &[Member]) -> [u8; 32] {
    let mut members = members.to_vec();
    members.sort_by_key(|member| member.id);
    let fields: Vec<u8> = members.iter().flat_map(|member| join(&[&member.id, &member.key])).collect();
    hash(&[b"ossicle members\0", sid, &version.to_be_bytes(), &fields])
}

/// What a chain is of, and its secrets.
#[derive(Clone, Copy)]
struct Chain {
    from: Member,
    sid: [u8; 16],
    mh: [u8; 32],
    /// A group: every message is signed.
    group: bool,
    id: [u8; 8],
    epoch: u32,
    ck: [u8; 32],
    signing: [u8; 32],
    rm: [u8; 32],
}

/// MK, SK and the next CK.
fn step(ck: &[u8; 32]) -> ([u8; 32], [u8; 32], [u8; 32]) {
    let all: [u8; 96] = expand(ck, &[b"ossicle step\0"]);
    (array(&all[..32]), array(&all[32..64]), array(&all[64..]))
}

/// A sealed message and what lies between.
struct Message {
    fields: Fields,
    envelope: Vec<u8>,
    salt: [u8; 8],
}

impl Chain {
    /// That of PROTOCOL 15.3.
    fn printed() -> Self {
        let sid = direct_sid(&A.id, &B.id, 5);
        Self {
            from: A,
            sid,
            mh: members_hash(&sid, 0, &[A, B]),
            group: false,
            id: [0x44; 8],
            epoch: 7,
            ck: [0x11; 32],
            signing: [0x22; 32],
            rm: [0x33; 32],
        }
    }

    /// One of three members.
    fn group() -> Self {
        let sid = [0x70; 16];
        Self { sid, mh: members_hash(&sid, 1, &[A, B, C]), group: true, id: [0x45; 8], ..Self::printed() }
    }

    fn ctx(&self) -> [u8; 32] {
        hash(&[
            b"ossicle chain\0",
            &self.from.id,
            &self.from.key,
            &self.sid,
            &self.mh,
            &self.id,
            &self.epoch.to_be_bytes(),
        ])
    }

    /// CK_n.
    fn ck(&self, n: u32) -> [u8; 32] {
        (0..n).fold(self.ck, |ck, _| step(&ck).2)
    }

    fn given(&self) -> Fields {
        Fields::new()
            .with("from", self.from.fields())
            .hex("sid", self.sid)
            .hex("mh", self.mh)
            .with("group", self.group)
            .hex("chain_id", self.id)
            .with("chain_epoch", self.epoch)
            .hex("CK_0", self.ck)
            .hex("sk_c", self.signing)
            .hex("RM", self.rm)
    }

    fn receipt_key(&self, recipient: &[u8; 16]) -> [u8; 32] {
        expand(&self.rm, &[b"ossicle receipt\0", recipient])
    }

    /// PROTOCOL 9.4.
    fn seal(&self, n: u32, signed: bool, kind: u8, body: &[u8]) -> Message {
        let (mk, sk, next) = step(&self.ck(n));
        let aad = join(&[&self.ctx(), &n.to_be_bytes()]);
        let mut text = join(&[&[if signed { kind | 0x80 } else { kind }], body]);
        let mut fields = Fields::new()
            .with("n", n)
            .with("signed", signed)
            .with("kind", kind)
            .hex("body", body)
            .hex("MK", mk)
            .hex("SK", sk)
            .hex("next_CK", next);
        if signed {
            let message = join(&[b"ossicle msg\0", &hash(&[&aad, &text])]);
            let signature = ed25519(&self.signing, &message);
            text.extend(signature);
            fields = fields.hex("signed_message", message).hex("signature", signature);
        }
        let salt: [u8; 8] = array(&mac(&sk, &[&aad, &text])[..8]);
        let nonce: [u8; 12] = array(&join(&[&salt, &n.to_be_bytes()]));
        let envelope = join(&[&self.id, &n.to_be_bytes(), &salt, &aead(&mk, &nonce, &aad, &text)]);
        let fields =
            fields.hex("text", &text).hex("salt", salt).hex("nonce", nonce).hex("aad", aad).hex("envelope", &envelope);
        Message { fields, envelope, salt }
    }

    fn announced(&self, bundle_epoch: u32, n: u32) -> Vec<u8> {
        join(&[
            b"ossicle announce\0",
            &self.ctx(),
            &bundle_epoch.to_be_bytes(),
            &n.to_be_bytes(),
            &hash(&[&self.ck(n)]),
            &signing_public(&self.signing),
        ])
    }

    /// PROTOCOL 9.3.
    fn wrap(&self, own: &Bundle, to: &Bundle, n: u32, ephemeral: &[u8; 32]) -> (Fields, Vec<u8>) {
        self.wrap_of(own, to, n, ephemeral, &self.announced(own.epoch, n))
    }

    /// The same with any announcement, for what must be refused.
    fn wrap_of(&self, own: &Bundle, to: &Bundle, n: u32, ephemeral: &[u8; 32], announced: &[u8]) -> (Fields, Vec<u8>) {
        let ann = ed25519(&own.signing, announced);
        let rk = self.receipt_key(&to.member.id);
        let ck = self.ck(n);
        let text = join(&[&n.to_be_bytes(), &ck, &signing_public(&self.signing), &rk, &ann]);
        let info = join(&[b"ossicle wrap\0", &self.ctx(), &own.hash(), &to.hash(), &to.prekey_id.to_be_bytes()]);
        let hpke = hpke_seal(ephemeral, &own.exchange, &exchange_public(&to.prekey), &info, &text);
        let wrap = join(&[
            &self.sid,
            &self.id,
            &self.epoch.to_be_bytes(),
            &to.prekey_id.to_be_bytes(),
            &hpke.enc,
            &hpke.sealed,
        ]);
        let fields = Fields::new()
            .hex("CTX", self.ctx())
            .hex("CK_n", ck)
            .hex("VKc", signing_public(&self.signing))
            .hex("announced", announced)
            .hex("ann", ann)
            .hex("RK", rk)
            .hex("info", info)
            .hex("text", text)
            .hex("enc", hpke.enc)
            .hex("hpke_shared_secret", hpke.shared_secret)
            .hex("hpke_key", hpke.key)
            .hex("hpke_nonce", hpke.nonce)
            .hex("wrap", &wrap);
        (fields, wrap)
    }
}

pub(super) fn files(keys: &Keys) -> Vec<(&'static str, Fields)> {
    vec![
        ("bundle.json", bundle(keys)),
        ("rotation.json", rotation(keys)),
        ("safety_number.json", safety_number(keys)),
        ("conversation.json", conversation()),
        ("group.json", group()),
        ("public.json", public()),
        ("wrap.json", wrap()),
        ("chain.json", chain()),
        ("receipt.json", receipt()),
    ]
}

fn bundle(keys: &Keys) -> Fields {
    let (a, b) = bundles();
    let plain = |name: &str, about: &str, bundle: &Bundle| {
        let signed = keys.alice.sign("ossicle bundle", &bundle.hash(), &random(name));
        Fields::new()
            .with("name", name)
            .with("about", about)
            .with("given", bundle.given())
            .with("gives", bundle.gives().hex("statement", &signed.message).hex("digest", signed.digest))
    };
    let signed = |name: &str, about: &str, bundle: &Bundle, key: &Rsa| {
        let salt = random(name);
        let signed = key.sign("ossicle bundle", &bundle.hash(), &salt);
        Fields::new()
            .with("name", name)
            .with("about", about)
            .with("given", bundle.given().with("identity_key", key.name).hex("pss_salt", salt))
            .with(
                "gives",
                bundle
                    .gives()
                    .hex("statement", &signed.message)
                    .hex("digest", signed.digest)
                    .hex("signature", &signed.signature),
            )
    };
    let first =
        Bundle { member: Member { id: [0xc1; 16], key: keys.alice.fingerprint() }, epoch: 1, prekey_id: 1, ..a };
    let second = Bundle { epoch: 2, prekey_id: 2, prekey: [0x5f; 32], previous: first.hash(), ..first };

    // What is remembered, and what is shown then (8.2).
    let seen = Bundle { epoch: 4, previous: [8; 32], ..a };
    let next = Bundle { epoch: 5, prekey_id: 11, prekey: [0x5f; 32], previous: seen.hash(), ..seen };
    let views = [
        ("another id", "refused", Bundle { member: Member { id: [9; 16], ..A }, ..next }),
        ("another key", "key changed", Bundle { member: Member { key: [9; 32], ..A }, ..next }),
        (
            "another key and a lower epoch",
            "key changed",
            Bundle { member: Member { key: [9; 32], ..A }, epoch: 1, ..next },
        ),
        ("a lower epoch", "refused", Bundle { epoch: 3, ..next }),
        ("the same bundle", "used", seen),
        ("another bundle of the same epoch", "forked", Bundle { epoch: 4, ..next }),
        ("the next, which names this one", "used", next),
        ("the next, which names none", "used", Bundle { previous: [0; 32], ..next }),
        ("the next, which names another", "forked", Bundle { previous: [9; 32], ..next }),
        ("a later one, which names another", "used", Bundle { epoch: 6, previous: [9; 32], ..next }),
    ];
    let views = views
        .map(|(name, then, shown)| Fields::new().with("name", name).hex("shown", shown.bytes()).with("then", then));
    head("Bundles, and what a peer makes of them", &["8.1", "8.2"])
        .with(
            "cases",
            vec![
                plain("A", "PROTOCOL 15.3", &a),
                plain("B", "PROTOCOL 15.3", &b),
                signed("first", "the first bundle of a client", &first, &keys.alice),
                signed("second", "a new prekey a week later", &second, &keys.alice),
            ],
        )
        .hex("remembered", seen.bytes())
        .with("views", views.to_vec())
}

fn rotation(keys: &Keys) -> Fields {
    let digests = |id: [u8; 16], present: [u8; 32], new: [u8; 32], epoch: u32, exporter: [u8; 32]| {
        let h = hash(&[&id, &present, &new, &epoch.to_be_bytes()]);
        (h, hash(&[&exporter, &h]))
    };
    let digest = |context: &str, h: &[u8; 32]| hash(&[&[0x20; 64], context.as_bytes(), &[0], h]);
    let given = |id, present: [u8; 32], new: [u8; 32], epoch: u32, exporter: [u8; 32]| {
        Member { id, key: present }.fields().hex("new_key", new).with("key_epoch", epoch).hex("exporter", exporter)
    };
    let (h, proof) = digests(A.id, A.key, B.key, 1, [7; 32]);
    let printed = Fields::new()
        .with("name", "digests")
        .with("about", "PROTOCOL 15.3; no keys belong to these fingerprints")
        .with("given", given(A.id, A.key, B.key, 1, [7; 32]))
        .with(
            "gives",
            Fields::new()
                .hex("h", h)
                .hex("digest_rotate", digest("ossicle rotate", &h))
                .hex("H(exporter h)", proof)
                .hex("digest_rotate_proof", digest("ossicle rotate proof", &proof)),
        );
    let (present, new) = (keys.alice.fingerprint(), keys.bob.fingerprint());
    let exporter = random("exporter");
    let (h, proof) = digests([0xc1; 16], present, new, 2, exporter);
    let (salt, salt_proof) = (random("rotate"), random("rotate proof"));
    let signed = keys.alice.sign("ossicle rotate", &h, &salt);
    let proved = keys.bob.sign("ossicle rotate proof", &proof, &salt_proof);
    let real = Fields::new()
        .with("name", "alice to bob")
        .with("about", "two real keys")
        .with(
            "given",
            given([0xc1; 16], present, new, 2, exporter)
                .with("present_key", "alice")
                .with("next_key", "bob")
                .hex("pss_salt", salt)
                .hex("pss_salt_proof", salt_proof),
        )
        .with(
            "gives",
            Fields::new()
                .hex("h", h)
                .hex("digest_rotate", signed.digest)
                .hex("signature", &signed.signature)
                .hex("H(exporter h)", proof)
                .hex("digest_rotate_proof", proved.digest)
                .hex("proof", &proved.signature),
        );
    head("Statements with which an identity key gives way to another", &["8.6"]).with("cases", vec![printed, real])
}

fn safety_number(keys: &Keys) -> Fields {
    let half = |member: &Member| {
        let first = hash(&[b"ossicle safety\0", &member.id, &member.key]);
        let last = (0..5_200).fold(first, |digest, _| hash(&[&digest, &member.key]));
        let group = |five: &[u8]| {
            let number = five.iter().fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
            format!("{:05}", number % 100_000)
        };
        (first, last, last[..30].chunks(5).map(group).collect::<Vec<_>>())
    };
    let case = |name: &str, about: &str, one: Member, other: Member| {
        let (lower, higher) = if one.id < other.id { (one, other) } else { (other, one) };
        let ((first_l, last_l, groups), (first_h, last_h, more)) = (half(&lower), half(&higher));
        Fields::new()
            .with("name", name)
            .with("about", about)
            .with("given", Fields::new().with("one", one.fields()).with("other", other.fields()))
            .with(
                "gives",
                Fields::new()
                    .hex("F_0_lower", first_l)
                    .hex("F_5200_lower", last_l)
                    .hex("F_0_higher", first_h)
                    .hex("F_5200_higher", last_h)
                    .with("safety_number", [groups, more].concat().join(" ")),
            )
    };
    let (alice, bob) = (
        Member { id: [0xc1; 16], key: keys.alice.fingerprint() },
        Member { id: [0xb0; 16], key: keys.bob.fingerprint() },
    );
    head("Safety numbers of two members", &["8.5"]).with(
        "cases",
        vec![
            case("A and B", "PROTOCOL 15.3", A, B),
            case("alice and bob", "real keys; the lower id is the other's", alice, bob),
        ],
    )
}

fn conversation() -> Fields {
    let direct = |name: &str, about: &str, one: Member, other: Member, counter: u32| {
        let sid = direct_sid(&one.id, &other.id, counter);
        Fields::new()
            .with("name", name)
            .with("about", about)
            .with(
                "given",
                Fields::new().with("one", one.fields()).with("other", other.fields()).with("counter", counter),
            )
            .with("gives", Fields::new().hex("sid", sid).hex("mh", members_hash(&sid, 0, &[one, other])))
    };
    let group = |name: &str, sid: [u8; 16], key_epochs: &[u32], members: &[Member]| {
        let version = key_epochs.iter().sum();
        let mh = members_hash(&sid, version, members);
        let seed = [0x53; 32];
        let rows = [
            ("ossicle init", Some(0)),
            ("ossicle init", Some(1)),
            ("ossicle accept", None),
            ("ossicle decline", None),
            ("ossicle close", None),
        ];
        let decision = |(label, flags): (&str, Option<u8>)| {
            let message = decided(label, &sid, &mh, flags);
            Fields::new()
                .with("label", label)
                .with("flags", flags)
                .hex("message", &message)
                .hex("signature", ed25519(&seed, &message))
        };
        let given = Fields::new()
            .hex("sid", sid)
            .with("key_epochs", key_epochs.to_vec())
            .with("members", members.iter().map(Member::fields).collect::<Vec<_>>())
            .hex("verifying_private", seed);
        let gives = Fields::new()
            .with("version", version)
            .hex("mh", mh)
            .hex("verifying", signing_public(&seed))
            .with("decisions", rows.map(decision).to_vec());
        Fields::new().with("name", name).with("given", given).with("gives", gives)
    };
    let many: Vec<_> = (0..64).map(|i| Member { id: [i; 16], key: hash(&[&[i]]) }).collect();
    head("Conversations: ids, members, and the decisions that members sign", &["9.1", "9.2"])
        .with(
            "direct",
            vec![
                direct("A and B", "PROTOCOL 15.3", A, B, 5),
                direct("B and A", "the other way round, before any closing", B, A, 0),
            ],
        )
        .with(
            "group",
            vec![
                group("three", [0x70; 16], &[1, 0, 0], &[A, B, C]),
                group("sixty-four", [0x71; 16], &[[0; 62].as_slice(), &[2, 7]].concat(), &many),
            ],
        )
}

/// What a member signs: PROTOCOL 9.2.
fn decided(label: &str, sid: &[u8; 16], mh: &[u8; 32], flags: Option<u8>) -> Vec<u8> {
    let flags = flags.map_or(Vec::new(), |flags| vec![flags]);
    join(&[label.as_bytes(), &[0], sid, mh, &flags])
}

/// A group as it is founded, and what is sealed and signed for that.
#[derive(Clone, Copy)]
struct Founding {
    sid: [u8; 16],
    mh: [u8; 32],
    creator: Bundle,
}

impl Founding {
    fn info(&self, to: &Bundle) -> Vec<u8> {
        let id = to.prekey_id.to_be_bytes();
        join(&[b"ossicle group name\0", &self.sid, &self.mh, &self.creator.member.id, &id])
    }

    /// Any text of 65 bytes, sealed to an invitee.
    fn seal(&self, to: &Bundle, text: &[u8], ephemeral: &[u8; 32]) -> Vec<u8> {
        assert_eq!(text.len(), 65);
        let hpke = hpke_seal(ephemeral, &self.creator.exchange, &exchange_public(&to.prekey), &self.info(to), text);
        join(&[&to.prekey_id.to_be_bytes(), &hpke.enc, &hpke.sealed])
    }
}

/// A name as it is sealed.
fn padded(name: &[u8]) -> Vec<u8> {
    let mut text = vec![u8::try_from(name.len()).expect("short")];
    text.extend(name);
    text.resize(65, 0);
    text
}

/// PROTOCOL 9.2 and 15.6.
fn group() -> Fields {
    let ((a, b), c) = (bundles(), third());
    let chain = Chain::group();
    let founding = Founding { sid: chain.sid, mh: chain.mh, creator: a };
    let name = "greenhouse";
    let text = padded(name.as_bytes());
    let (to_b, to_c) = (founding.seal(&b, &text, &[0x73; 32]), founding.seal(&c, &text, &[0x74; 32]));
    let sign = |label: &str, flags: Option<u8>, by: &Bundle| {
        ed25519(&by.signing, &decided(label, &chain.sid, &chain.mh, flags))
    };
    let init = sign("ossicle init", Some(1), &a);
    let members: Vec<u8> = [A, B, C].iter().flat_map(|member| join(&[&member.id, &member.key])).collect();
    let length = |bytes: &[u8]| {
        let len = u8::try_from(bytes.len() & 0x7f).expect("seven bits");
        if bytes.len() < 128 { vec![len] } else { vec![len | 0x80, u8::try_from(bytes.len() >> 7).expect("short")] }
    };
    let bytes = |bytes: &[u8]| [length(bytes), bytes.to_vec()].concat();
    let names = [&to_b[..], &to_c].concat();
    let request = join(&[&[0, 0, 1], &chain.sid, &[1], &bytes(&init), &bytes(&members), &bytes(&names)]);
    let invite =
        |name: &[u8]| join(&[&[3, 0x20], &chain.sid, &A.id, &[1], &bytes(&init), &bytes(&members), &bytes(name)]);
    let given = Fields::new()
        .hex("sid", chain.sid)
        .with("key_epochs", vec![1_u32, 0, 0])
        .with("flags", 1_u8)
        .with("name", name)
        .with("creator", a.given())
        .with("invitees", vec![b.given(), c.given()])
        .hex("ephemeral_private_B", [0x73; 32])
        .hex("ephemeral_private_C", [0x74; 32])
        .with("chain", chain.given());
    let message = chain.seal(0, true, 0, b"who waters today?");
    let gives = Fields::new()
        .hex("bundle_C", c.bytes())
        .with("version", 1_u32)
        .hex("mh", chain.mh)
        .hex("decided", decided("ossicle init", &chain.sid, &chain.mh, Some(1)))
        .hex("init", init)
        .hex("info_B", founding.info(&b))
        .hex("info_C", founding.info(&c))
        .hex("text", &text)
        .hex("name_B", &to_b)
        .hex("name_C", &to_c)
        .hex("Init", request)
        .hex("Invite", invite(&to_b))
        .hex("Invite_C", invite(&to_c))
        .hex("accept_B", sign("ossicle accept", None, &b))
        .hex("decline_C", sign("ossicle decline", None, &c))
        .hex("CTX", chain.ctx())
        .hex("message", &message.envelope)
        .hex("close_A", sign("ossicle close", None, &a));
    let case = Fields::new()
        .with("name", "three")
        .with("about", "PROTOCOL 15.6; the ephemeral private keys are given as they are")
        .with("given", given)
        .with("gives", gives);

    let other = |change: fn(&mut Founding)| {
        let mut other = founding;
        change(&mut other);
        other.seal(&b, &text, &[0x73; 32])
    };
    let odd = |text: Vec<u8>| founding.seal(&b, &text, &[0x73; 32]);
    let mut behind = padded(b"greenhouse");
    behind[64] = 1;
    let mut longer = padded(b"");
    longer[0] = 65;
    let refused = [
        ("sealed to another member", founding.seal(&c, &text, &[0x73; 32])),
        ("to a prekey that is not held", founding.seal(&Bundle { prekey_id: 5, ..b }, &text, &[0x73; 32])),
        ("by another member", other(|founding| founding.creator = Bundle { member: A, ..third() })),
        ("as another creator's", other(|founding| founding.creator.member.id = [3; 16])),
        ("of another group", other(|founding| founding.sid = [0x71; 16])),
        ("of other members", other(|founding| founding.mh = [9; 32])),
        ("no name", odd(padded(b""))),
        ("a byte behind the name", odd(behind)),
        ("longer than there is room", odd(longer)),
        ("not UTF-8", odd(padded(&[0xc3, 0x28]))),
    ];
    let refused = refused.map(|(why, sealed)| Fields::new().with("why", why).hex("name", sealed));
    head("A group from its founding to its end; the names in `refused` are for B of the case", &["9.1", "9.2", "15.6"])
        .with("cases", vec![case])
        .with("refused", refused.to_vec())
}

/// A post, and what is signed of it: PROTOCOL 9.9.
#[derive(Clone, Copy)]
struct Post<'b> {
    network: [u8; 32],
    author: Member,
    epoch: u32,
    number: u64,
    at: u64,
    kind: u8,
    body: &'b [u8],
}

impl Post<'_> {
    fn said(&self) -> Vec<u8> {
        join(&[
            b"ossicle public\0",
            &self.network,
            &self.author.id,
            &self.author.key,
            &self.epoch.to_be_bytes(),
            &self.number.to_be_bytes(),
            &self.at.to_be_bytes(),
            &[self.kind],
            &hash(&[self.body]),
        ])
    }

    fn fields(&self) -> Fields {
        Fields::new()
            .with("number", self.number)
            .with("at", self.at)
            .with("epoch", self.epoch)
            .with("kind", self.kind)
            .hex("body", self.body)
    }

    /// The request with this number below 128.
    fn say(&self, request: u8, signature: &[u8]) -> Vec<u8> {
        let varint = |mut value: u64| {
            let mut bytes = Vec::new();
            while value >= 0x80 {
                bytes.push(u8::try_from(value & 0x7f | 0x80).expect("a byte"));
                value >>= 7;
            }
            bytes.push(u8::try_from(value).expect("a byte"));
            bytes
        };
        let len = varint(u64::try_from(self.body.len()).expect("short"));
        let (number, at, epoch) = (varint(self.number), varint(self.at), varint(self.epoch.into()));
        join(&[&[2, 1, request], &number, &at, &epoch, &[self.kind, 64], signature, &len, self.body])
    }
}

fn public() -> Fields {
    let (a, b) = bundles();
    let time = 1_790_000_000_123;
    let printed =
        Post { network: [0xa5; 32], author: A, epoch: 9, number: time, at: time, kind: 0, body: b"who is in the lab?" };
    let case = |name: &str, about: &str, by: &Bundle, post: Post<'_>| {
        let signature = ed25519(&by.signing, &post.said());
        Fields::new()
            .with("name", name)
            .with("about", about)
            .with(
                "given",
                Fields::new().hex("network", post.network).with("author", by.given()).with("post", post.fields()),
            )
            .with(
                "gives",
                Fields::new()
                    .hex("H(body)", hash(&[post.body]))
                    .hex("said", post.said())
                    .hex("signature", signature)
                    .hex("Say", post.say(16, &signature)),
            )
    };
    let signature = ed25519(&a.signing, &printed.said());
    let mut broken = signature;
    broken[63] ^= 1;
    let refused = [
        ("a broken signature", printed, broken, &a),
        ("another author's", printed, signature, &b),
        ("of another network", Post { network: [0xa6; 32], ..printed }, signature, &a),
        ("under another number", Post { number: time + 1, ..printed }, signature, &a),
        ("of another time", Post { at: 0, ..printed }, signature, &a),
        ("of another epoch", Post { epoch: 8, ..printed }, signature, &a),
        ("of another kind", Post { kind: 1, ..printed }, signature, &a),
        ("another text", Post { body: b"who is in the lab!", ..printed }, signature, &a),
        ("a key that was replaced", printed, signature, &Bundle { member: Member { key: [9; 32], ..A }, ..a }),
    ];
    let refused = refused.map(|(why, post, signature, by)| {
        Fields::new()
            .with("why", why)
            .hex("network", post.network)
            .with("author", by.given())
            .with("post", post.fields())
            .hex("signature", signature)
    });
    head("The public conversation: posts, and what is nobody's word", &["9.9", "15.8"])
        .with(
            "cases",
            vec![
                case("A", "PROTOCOL 15.8", &a, printed),
                case(
                    "B",
                    "the longest, of the last kind",
                    &b,
                    Post { author: B, epoch: 3, number: u64::MAX, at: 0, kind: 127, body: &[0xfe; 800], ..printed },
                ),
            ],
        )
        .with("refused", refused.to_vec())
}

fn wrap() -> Fields {
    let (a, b) = bundles();
    let sides = |chain: &Chain, n: u32| {
        Fields::new().with("chain", chain.given()).with("sender", a.given()).with("recipient", b.given()).with("n", n)
    };
    let printed = Chain::printed();
    let case = |name: &str, about: &str, given: Fields, fields: Fields| {
        Fields::new().with("name", name).with("about", about).with("given", given).with("gives", fields)
    };
    let group = Chain::group();
    let drawn = random("HPKE");
    let (fields, good) = printed.wrap(&a, &b, 0, &[0x71; 32]);
    let cases = vec![
        case(
            "direct",
            "PROTOCOL 15.3; the ephemeral private key is given as it is",
            sides(&printed, 0).hex("ephemeral_private", [0x71; 32]),
            fields,
        ),
        case(
            "direct, drawn",
            "the ephemeral key pair by DeriveKeyPair of RFC 9180 from 32 random bytes, as most libraries make it",
            sides(&printed, 0).hex("ikm_E", drawn).hex("ephemeral_private", hpke_derive(&drawn)),
            printed.wrap(&a, &b, 0, &hpke_derive(&drawn)).0,
        ),
        case(
            "group, from message 3 on",
            "for a member who joined later",
            sides(&group, 3).hex("ephemeral_private", [0x72; 32]),
            group.wrap(&a, &b, 3, &[0x72; 32]).0,
        ),
    ];

    let flipped = |at: usize| {
        let mut wrap = good.clone();
        wrap[at] ^= 8;
        wrap
    };
    let wrap = |chain: &Chain, own: &Bundle, to: &Bundle| chain.wrap(own, to, 0, &[0x71; 32]).1;
    let unannounced = |announced: &[u8]| printed.wrap_of(&a, &b, 0, &[0x71; 32], announced).1;
    let other = Bundle { exchange: [0x91; 32], ..a };
    let refused = [
        ("a byte too few", "unreadable", good[..243].to_vec()),
        ("a byte too many", "unreadable", join(&[&good, &[0]])),
        ("another sid", "unreadable", flipped(0)),
        ("another chain id", "unreadable", flipped(16)),
        ("another chain epoch", "unreadable", flipped(27)),
        ("a prekey that is not held", "unreadable", flipped(31)),
        ("another encapsulated key", "unreadable", flipped(32)),
        ("another ciphertext", "unreadable", flipped(64)),
        ("another tag", "unreadable", flipped(243)),
        ("sealed with another sender key", "unreadable", wrap(&printed, &other, &b)),
        ("sealed under another bundle of the recipient", "unreadable", wrap(&printed, &a, &Bundle { epoch: 4, ..b })),
        ("sealed under another bundle of the sender", "unreadable", wrap(&printed, &Bundle { epoch: 8, ..a }, &b)),
        ("of another view of the members", "unreadable", wrap(&Chain { mh: [9; 32], ..printed }, &a, &b)),
        ("announced for another bundle's epoch", "unreadable", unannounced(&printed.announced(8, 0))),
        ("announced for another number", "unreadable", unannounced(&printed.announced(9, 1))),
        ("announced for another chain", "unreadable", unannounced(&group.announced(9, 0))),
        ("from number 65,536 on", "unreadable", printed_from(&printed, &a, &b, 65_536)),
        ("of a chain epoch that was seen", "replayed", wrap(&Chain { epoch: 6, ..printed }, &a, &b)),
    ];
    let refused =
        refused.map(|(name, result, wrap)| Fields::new().with("name", name).hex("wrap", wrap).with("result", result));
    head(
        "Wraps; those in `refused` are for the recipient of the first case, who has accepted (9, 6) before",
        &["9.3", "9.5"],
    )
    .with("cases", cases)
    .with("refused", refused.to_vec())
}

/// A wrap that is right in all but its first number; no chain gets that far.
fn printed_from(chain: &Chain, own: &Bundle, to: &Bundle, n: u32) -> Vec<u8> {
    let fresh = Chain { ck: [0x12; 32], ..*chain };
    let announced = join(&[
        b"ossicle announce\0",
        &fresh.ctx(),
        &own.epoch.to_be_bytes(),
        &n.to_be_bytes(),
        &hash(&[&fresh.ck]),
        &signing_public(&fresh.signing),
    ]);
    let ann = ed25519(&own.signing, &announced);
    let verifying = signing_public(&fresh.signing);
    let text = join(&[&n.to_be_bytes(), &fresh.ck, &verifying, &fresh.receipt_key(&to.member.id), &ann]);
    let info = join(&[b"ossicle wrap\0", &fresh.ctx(), &own.hash(), &to.hash(), &to.prekey_id.to_be_bytes()]);
    let hpke = hpke_seal(&[0x71; 32], &own.exchange, &exchange_public(&to.prekey), &info, &text);
    join(&[&fresh.sid, &fresh.id, &fresh.epoch.to_be_bytes(), &to.prekey_id.to_be_bytes(), &hpke.enc, &hpke.sealed])
}

/// A recipient of PROTOCOL 9.6 that counts only: what the table says, without any key.
struct Recipient {
    next: u32,
    held: Vec<u32>,
    rows: Vec<Json>,
}

impl Recipient {
    fn row(&mut self, about: &str, envelope: &[u8], result: &str, opened: Option<&Message>) {
        let mut row = Fields::new().with("about", about).hex("envelope", envelope).with("result", result);
        if let Some(message) = opened {
            row.put("opened", message.fields.clone());
        }
        let held: Vec<_> = self.held.iter().copied().map(Json::from).collect();
        self.rows.push(row.with("next", self.next).with("held", Json::List(held)).into());
    }

    /// Opened: ahead, with the keys of the skipped held, or with a held key.
    fn opens(&mut self, about: &str, chain: &Chain, n: u32, signed: bool, kind: u8, body: &[u8]) -> Vec<u8> {
        let message = chain.seal(n, signed, kind, body);
        if n >= self.next {
            self.held.extend(self.next..n);
            self.next = n + 1;
        } else {
            let place = self.held.iter().position(|held| *held == n).expect("its key is held");
            self.held.remove(place);
        }
        self.row(about, &message.envelope, "opened", Some(&message));
        message.envelope
    }

    fn refuses(&mut self, about: &str, envelope: &[u8], result: &str) {
        self.row(about, envelope, result, None);
    }
}

const SKIP: u32 = 64;

fn sequence(name: &str, about: &str, chain: &Chain, first: u32, run: impl FnOnce(&mut Recipient)) -> Fields {
    let (a, b) = bundles();
    let mut recipient = Recipient { next: first, held: Vec::new(), rows: Vec::new() };
    run(&mut recipient);
    Fields::new()
        .with("name", name)
        .with("about", about)
        .with("chain", chain.given())
        .with("sender", a.given())
        .with("recipient", b.given())
        .with("first", first)
        .hex("wrap", chain.wrap(&a, &b, first, &[0x71; 32]).1)
        .with("S", SKIP)
        .with("envelopes", Json::List(recipient.rows))
}

fn chain() -> Fields {
    let printed = Chain::printed();
    let flipped = |envelope: &[u8], at: usize| {
        let mut envelope = envelope.to_vec();
        envelope[at] ^= 1;
        envelope
    };
    let plain = sequence("in order", "PROTOCOL 15.3, and a long one", &printed, 0, |recipient| {
        let zero = recipient.opens("unsigned", &printed, 0, false, 1, b"hello");
        recipient.opens("signed, empty", &printed, 1, true, 2, b"");
        recipient.opens("1,000 bytes", &printed, 2, true, 0x7f, &[0xa5; 1_000]);
        recipient.refuses("the first again", &zero, "duplicate");
        let other = printed.seal(0, false, 1, b"hallo");
        recipient.refuses("another text under the first number", &other.envelope, "rewound");
    });
    let skips =
        sequence("across skips", "messages that are lost, late, too far ahead, or changed", &printed, 0, |recipient| {
            let late = printed.seal(1, false, 0, b"late");
            let unsigned = printed.seal(4, false, 0, b"four");
            recipient.opens("the first", &printed, 0, false, 0, b"zero");
            recipient.opens("5, while 1 to 4 are missing", &printed, 5, false, 0, b"five");
            recipient.opens("4, whose key is held", &printed, 4, true, 0, b"four, signed");
            recipient.refuses("4 again, with another text", &unsigned.envelope, "rewound");
            recipient.refuses(
                "1, with a wrong tag: its key stays",
                &flipped(&late.envelope, late.envelope.len() - 1),
                "unreadable",
            );
            recipient.opens("1, as it was sent", &printed, 1, false, 0, b"late");
            recipient.refuses("1 again", &late.envelope, "duplicate");
            let far = printed.seal(6 + SKIP - 1, false, 0, b"far");
            recipient.refuses("69, while 2 and 3 are missing: 63 keys more are too many", &far.envelope, "gap");
            recipient.opens("68: 62 keys more are just enough", &printed, 68, false, 0, b"sixty-eight");
            recipient.refuses("another chain's", &flipped(&late.envelope, 0), "rekey");
            recipient.refuses(
                "a number beyond the last",
                &{
                    let mut envelope = late.envelope.clone();
                    envelope[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
                    envelope
                },
                "gap",
            );
            recipient.refuses("36 bytes", &late.envelope[..36], "dropped");
            for n in 69..86 {
                recipient.opens("sixteen more, so that 5 is forgotten", &printed, n, false, 0, &n.to_be_bytes());
            }
            recipient.refuses("5 again, long after", &printed.seal(5, false, 0, b"five").envelope, "old");
            recipient.opens("3, still held", &printed, 3, false, 0, b"three");
        });
    let group = Chain::group();
    let groups = sequence("of a group, from message 3 on", "every message is signed", &group, 3, |recipient| {
        recipient.refuses("before the wrap's first", &group.seal(2, true, 0, b"two").envelope, "unreadable");
        recipient.refuses("unsigned", &group.seal(3, false, 0, b"three").envelope, "unreadable");
        let forged = Chain { signing: [0x23; 32], ..group };
        recipient.refuses("signed by another key", &forged.seal(3, true, 0, b"three").envelope, "unreadable");
        let signed = group.seal(3, true, 0, b"three");
        recipient.refuses("another salt", &flipped(&signed.envelope, 12), "unreadable");
        recipient.refuses("another ciphertext", &flipped(&signed.envelope, 20), "unreadable");
        recipient.opens("signed", &group, 3, true, 0, b"three");
        recipient.opens("the next", &group, 4, true, 5, b"");
    });
    let last = 65_535;
    let end = sequence("at its end", "the last number that a chain has", &printed, last, |recipient| {
        recipient.refuses(
            "beyond the last number",
            &printed.seal(last + 1, false, 0, b"beyond").envelope,
            "unreadable",
        );
        let envelope = recipient.opens("the last", &printed, last, false, 0, b"the last");
        recipient.refuses("the last again", &envelope, "duplicate");
        recipient.refuses("beyond it", &printed.seal(last + 1, false, 0, b"beyond").envelope, "unreadable");
    });
    head("Messages of a chain, and what a recipient with S places for skipped keys makes of them", &["9.4", "9.6"])
        .with("cases", vec![plain, skips, groups, end])
}

fn receipt() -> Fields {
    let (a, b) = bundles();
    let chain = Chain::printed();
    let (zero, one) = (chain.seal(0, false, 1, b"hello"), chain.seal(1, true, 2, b""));
    let rk = chain.receipt_key(&B.id);
    let input = |rung: u8, reason: Option<u8>, from: u32, to: u32, salt: &[u8; 8]| {
        let reason = reason.map_or(Vec::new(), |reason| vec![reason]);
        let (from, to) = (from.to_be_bytes(), to.to_be_bytes());
        join(&[b"ossicle rcpt\0", &chain.ctx(), &B.id, &[rung], &reason, &from, &to, salt])
    };
    let tag = |input: &[u8]| array::<16>(&mac(&rk, &[input])[..16]);
    let case = |name: &str, rung: u8, reason: Option<u8>, from: u32, to: u32, salt: &[u8; 8]| {
        let input = input(rung, reason, from, to, salt);
        let given = Fields::new()
            .with("rung", rung)
            .with("reason", reason)
            .with("from", from)
            .with("to", to)
            .hex("salt_of_to", salt);
        let gives = Fields::new().hex("input", &input).hex("tag", tag(&input));
        Fields::new().with("name", name).with("given", given).with("gives", gives)
    };
    let verdict = |name: &str,
                   id: [u8; 8],
                   rung: u8,
                   reason: Option<u8>,
                   (from, to): (u32, u32),
                   tag: Option<[u8; 16]>,
                   ok: bool| {
        Fields::new()
            .with("name", name)
            .hex("chain", id)
            .with("rung", rung)
            .with("reason", reason)
            .with("from", from)
            .with("to", to)
            .with("tag", tag.map(hex::encode))
            .with("recipients_word", ok)
    };
    let delivered = tag(&input(3, None, 0, 1, &one.salt));
    let refused = tag(&input(5, Some(15), 1, 1, &one.salt));
    let swapped = tag(&input(3, None, 1, 0, &zero.salt));
    let accepted = tag(&input(1, None, 0, 1, &one.salt));
    let reasoned = tag(&input(3, Some(15), 0, 1, &one.salt));
    let unreasoned = tag(&input(5, None, 1, 1, &one.salt));
    let beyond = tag(&input(3, None, 0, 2, &one.salt));
    let id = chain.id;
    head("Receipts of B for the messages 0 and 1 of PROTOCOL 15.3", &["10.1", "10.3", "10.4"])
        .with("chain", chain.given())
        .with("sender", a.given())
        .with("recipient", b.given())
        .hex("wrap", chain.wrap(&a, &b, 0, &[0x71; 32]).1)
        .hex("CTX", chain.ctx())
        .hex("RK", rk)
        .with("envelopes", vec![hex::encode(&zero.envelope), hex::encode(&one.envelope)])
        .with("messages", vec![zero.fields.clone(), one.fields.clone()])
        .with(
            "cases",
            vec![
                case("delivered", 3, None, 0, 1, &one.salt),
                case("delivered, one", 3, None, 0, 0, &zero.salt),
                case("opened", 4, None, 0, 1, &one.salt),
                case("refused", 5, Some(15), 1, 1, &one.salt),
                case("refused, gap", 5, Some(16), 1, 1, &one.salt),
                case("refused, queue-full", 5, Some(9), 0, 0, &zero.salt),
            ],
        )
        .with(
            "verdicts",
            vec![
                verdict("delivered", id, 3, None, (0, 1), Some(delivered), true),
                verdict("refused with a reason", id, 5, Some(15), (1, 1), Some(refused), true),
                verdict("delivered, without a tag", id, 3, None, (0, 1), None, false),
                verdict("opened, with the tag of delivered", id, 4, None, (0, 1), Some(delivered), false),
                verdict("delivered, of fewer than the tag says", id, 3, None, (1, 1), Some(delivered), false),
                verdict("refused, with the tag of another reason", id, 5, Some(16), (1, 1), Some(refused), false),
                verdict("from behind to", id, 3, None, (1, 0), Some(swapped), false),
                verdict("accepted is the server's word, whatever the tag", id, 1, None, (0, 1), Some(accepted), false),
                verdict("delivered with a reason", id, 3, Some(15), (0, 1), Some(reasoned), false),
                verdict("refused without a reason", id, 5, None, (1, 1), Some(unreasoned), false),
                verdict("to beyond what was sealed", id, 3, None, (0, 2), Some(beyond), false),
                verdict("another chain", [0x46; 8], 3, None, (0, 1), Some(delivered), false),
            ],
        )
}
