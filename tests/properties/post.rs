//! Two authors who say things in two networks, and a server that gives a reader in one of them whatever it has seen: in any
//! order, changed in a bit, in another's name, or as it came. The model is what PROTOCOL 9.9 says of a reader.

use std::collections::BTreeMap;

use ossicle_core::{Bundle, BundleKeys, Error, Fixed, Follow, FollowResponse, Member, Message, Post, Said, Say};
use ossicle_tests::Rng;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::Reached;

const NETWORKS: [[u8; 32]; 2] = [[0x51; 32], [0x52; 32]];
/// The reader's.
const HERE: usize = 0;

#[derive(Clone, Debug)]
enum Step {
    /// An author says so many bytes in a network, and his count grows by so much.
    Say { author: usize, network: usize, growth: u64, kind: u8, body: Vec<u8> },
    /// The server gives what it has seen once, stamped with an author, changed in a bit or not.
    Give { which: Index, stamp: usize, change: Option<(Index, u8)> },
    /// The same, for its author and unchanged.
    GiveHonestly(Index),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let say = (0..2_usize, prop::bool::weighted(0.2), 1..1000_u64, 0..=127_u8, vec(any::<u8>(), 1..80));
    let change = prop::option::weighted(0.6, (any::<Index>(), 0..8_u8));
    let step = prop_oneof![
        4 => say.prop_map(|(author, elsewhere, growth, kind, body)| {
            Step::Say { author, network: usize::from(elsewhere), growth, kind, body }
        }),
        4 => (any::<Index>(), 0..2_usize, change).prop_map(|(which, stamp, change)| Step::Give { which, stamp, change }),
        4 => any::<Index>().prop_map(Step::GiveHonestly),
    ];
    vec(step, 1..30)
}

struct Author {
    member: Member,
    keys: BundleKeys,
    bundle: Bundle,
    count: u64,
}

/// What was said: the author, the network, the body of the request.
type Seen = (usize, usize, Vec<u8>);

fn payload(message: &Message<'_>) -> Vec<u8> {
    let mut payload = vec![0; 2048];
    let len = message.encode(&mut payload).unwrap();
    payload.truncate(len);
    payload
}

fn read(payload: &[u8]) -> Option<Say<'_>> {
    let Ok(Message::Other(body)) = Message::decode(payload) else { return None };
    Say::decode(body).ok()
}

#[test]
fn a_reader_is_shown_what_was_said_here_once_and_in_its_order() {
    let must_reach = ["shown", "a changed one", "another's", "of elsewhere", "shown before", "no post at all"];
    crate::check("properties/post.regressions", 150, &must_reach, &steps(), |steps, reached: &Reached| {
        let mut authors = [1_u8, 2].map(|id| {
            let member = Member { id: [id; 16], key: [id + 9; 32] };
            let keys = BundleKeys::generate(u32::from(id), &mut Rng::new(id)).unwrap();
            let bundle = keys.bundle(&member, 1, [0; 32]);
            Author { member, keys, bundle, count: 0 }
        });
        let mut seen: Vec<Seen> = Vec::new();
        let mut last: BTreeMap<usize, u64> = BTreeMap::new();
        let mut give =
            |seen: &[Seen], authors: &[Author; 2], which: Index, stamp: Option<usize>, change: Option<(Index, u8)>| {
                let Some((author, network, said)) = seen.get(which.index(seen.len().max(1))) else { return };
                let stamp = stamp.unwrap_or(*author);
                let mut given = said.clone();
                if let Some((place, bit)) = change {
                    // Not the code, which says what it is, nor the number of the request, which nobody signs.
                    let place = 3 + place.index(given.len() - 3);
                    given[place] ^= 1_u8 << bit;
                }
                let Some(Say { post, .. }) = read(&given) else { return reached.note("no post at all") };
                // A page takes it as it is.
                let mut line = vec![0; Said::MAX_LEN];
                let len = Said { seq: 1, author: [0; 16], post }.append(&mut line).unwrap();
                let page = FollowResponse { request: 1, more: false, lines: &line[..len] };
                let mut buffer = [0; 2048];
                let Ok(Message::Other(body)) = page.encode(&mut buffer) else { panic!("a body") };
                assert!(Follow::decode(body).is_err());
                let page = FollowResponse::decode(body).unwrap();
                let post = Said::lines(page.lines).next().unwrap().unwrap().post;
                let verified = post.verify(&NETWORKS[HERE], &authors[stamp].bundle);
                let is_said = read(said).is_some_and(|say| say.post == post);
                match (is_said, stamp == *author, *network == HERE) {
                    (true, true, true) if last.get(author).is_none_or(|last| post.number > *last) => {
                        assert_eq!(verified, Ok(()));
                        last.insert(*author, post.number);
                        reached.note("shown");
                    }
                    (true, true, true) => reached.note("shown before"),
                    (false, ..) => {
                        assert!(matches!(verified, Err(Error::Crypto | Error::Decode)), "{post:?}");
                        reached.note("a changed one");
                    }
                    (true, false, _) => {
                        assert_eq!(verified, Err(Error::Crypto));
                        reached.note("another's");
                    }
                    (true, true, false) => {
                        assert_eq!(verified, Err(Error::Crypto));
                        reached.note("of elsewhere");
                    }
                }
            };
        for step in steps {
            match step {
                Step::Say { author, network, growth, kind, body } => {
                    let Author { member, keys, count, .. } = &mut authors[author];
                    *count += growth;
                    let post =
                        Post { number: *count, at: *count, epoch: 1, kind, signature: Fixed(&[0; 64]), body: &body };
                    let signature = post.sign(&NETWORKS[network], member, keys).unwrap();
                    let post = Post { signature: Fixed(&signature), ..post };
                    let said = payload(&Say { request: 1, post }.encode(&mut [0; 1024]).unwrap());
                    seen.push((author, network, said));
                }
                Step::Give { which, stamp, change } => give(&seen, &authors, which, Some(stamp), change),
                Step::GiveHonestly(which) => give(&seen, &authors, which, None, None),
            }
        }
    });
}
